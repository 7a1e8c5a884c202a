// Builds and patches the document. Text only ever becomes text: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** Makes an element: `h("a.link", { href }, "text", child)`; `false` and `null` children vanish. */
export function h(tag, properties, ...children) {
  return build(document.createElement.bind(document), tag, properties, children);
}

/** The same for SVG elements. */
export function s(tag, properties, ...children) {
  return build((name) => document.createElementNS(SVG, name), tag, properties, children);
}

function build(create, tag, properties, children) {
  const [name, ...classes] = tag.split(".");
  const element = create(name);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") {
      element.setAttribute("class", [...classes, value].join(" ").trim());
    } else if (key === "on") {
      listen(element, value);
    } else if (key === "grow") {
      // The one way to a size that is data: through the object model, which the policy allows.
      element.dataset.grow = String(value);
      element.style.setProperty("--grow", String(value));
    } else {
      element.setAttribute(key, value === true ? "" : String(value));
    }
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false || child === "") continue;
    if (Array.isArray(child)) add(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

// One listener for each kind of event, which looks up the handler when it fires: so a patched
// element can take over the handler of the newer one.
function listen(element, handlers) {
  element.handlers = handlers;
  for (const type of Object.keys(handlers)) {
    element.addEventListener(type, (event) => element.handlers?.[type]?.(event));
  }
}

/** Patches `element`'s children into `wanted`, keeping focus, scrolling and what people opened. */
export function patch(element, ...wanted) {
  const next = document.createDocumentFragment();
  add(next, wanted);
  patchChildren(element, next);
}

const keyOf = (node) =>
  node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null;

function patchChildren(current, next) {
  const keyed = new Map();
  for (const node of current.childNodes) {
    const key = keyOf(node);
    if (key !== null) keyed.set(key, node);
  }
  let at = current.firstChild;
  for (const node of [...next.childNodes]) {
    const key = keyOf(node);
    let match = key === null ? at : keyed.get(key);
    if (match && (match.nodeName !== node.nodeName || keyOf(match) !== key)) match = null;
    if (match) {
      if (match === at) at = at.nextSibling;
      else current.insertBefore(match, at);
      patchNode(match, node);
    } else {
      current.insertBefore(node, at);
    }
  }
  while (at) {
    const after = at.nextSibling;
    at.remove();
    at = after;
  }
}

// What people change by themselves stays theirs.
const OWN = { DETAILS: ["open"], DIALOG: ["open"], INPUT: ["value"], SELECT: [], TEXTAREA: [] };

function patchNode(current, next) {
  if (current.nodeType === Node.TEXT_NODE) {
    if (current.data !== next.data) current.data = next.data;
    return;
  }
  if (current.nodeType !== Node.ELEMENT_NODE) return;
  const own = OWN[current.nodeName] ?? [];
  for (const { name } of [...current.attributes]) {
    if (name !== "style" && !own.includes(name) && !next.hasAttribute(name)) {
      current.removeAttribute(name);
    }
  }
  for (const { name, value } of next.attributes) {
    if (name === "style" || own.includes(name)) continue;
    if (current.getAttribute(name) !== value) current.setAttribute(name, value);
  }
  if (next.dataset?.grow !== undefined) current.style.setProperty("--grow", next.dataset.grow);
  if (next.handlers) {
    if (current.handlers) current.handlers = next.handlers;
    else listen(current, next.handlers);
  } else if (current.handlers) {
    current.handlers = {};
  }
  patchChildren(current, next);
}
