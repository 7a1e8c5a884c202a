// The pieces that pages are made of.

import { get } from "./api.js";
import { h, s } from "./dom.js";
import { ago, clock, short } from "./format.js";
import { STATES } from "./model.js";

const MARKS = {
  check: "M3.5 8.6 6.6 11.6 12.5 4.8",
  cross: "M4.5 4.5 11.5 11.5M11.5 4.5 4.5 11.5",
  arrow: "M3 8H12.5M8.8 4.3 12.5 8 8.8 11.7",
  pause: "M6 4.2V11.8M10 4.2V11.8",
  ring: "M8 4.4A3.6 3.6 0 1 1 8 11.6 3.6 3.6 0 1 1 8 4.4",
  bang: "M8 3.6V9M8 11.7V12.1",
  back: "M6 3.6 2.9 6.7 6 9.8M2.9 6.7H10A2.9 2.9 0 0 1 10 12.5H7.5",
  copy: "M5.5 5.5H12.5V13H5.5ZM3.5 10.5V3H10.5",
  sun: "M8 5.2A2.8 2.8 0 1 1 8 10.8 2.8 2.8 0 1 1 8 5.2M8 1.5V2.7M8 13.3V14.5M1.5 8H2.7M13.3 8H14.5M3.4 3.4 4.3 4.3M11.7 11.7 12.6 12.6M3.4 12.6 4.3 11.7M11.7 4.3 12.6 3.4",
  moon: "M12.8 9.6A5.2 5.2 0 1 1 6.4 3.2 4.2 4.2 0 0 0 12.8 9.6Z",
  auto: "M8 2.8A5.2 5.2 0 1 1 8 13.2 5.2 5.2 0 1 1 8 2.8M8 2.8V13.2M8 5.4H11.5M8 8H13M8 10.6H11.5",
  next: "M6 3.5 10.5 8 6 12.5",
  leave: "M9.5 3H4V13H9.5M7 8H13.5M11 5.5 13.5 8 11 10.5",
};

/** A small drawn mark; decoration, so hidden from readers. */
export function mark(name) {
  const path = s("path", { d: MARKS[name] ?? MARKS.ring });
  return s("svg.mark", { viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" }, path);
}

/** A state as mark and word. */
export function chip(state, label, properties) {
  const { tone, mark: drawn, label: word } = STATES[state] ?? STATES.pending;
  return h(
    "span.chip",
    { "data-tone": tone, ...properties },
    mark(drawn),
    h("span", null, label ?? word),
  );
}

/** A moment, told relatively and kept so; the exact time is the tooltip. */
export function when(instant, prefix) {
  if (!instant) return h("span.faint", null, "–");
  return h(
    "time",
    { datetime: instant, title: clock(instant), "data-prefix": prefix },
    (prefix ?? "") + ago(instant),
  );
}

/** Brings every shown relative time up to date. */
export function tickTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const text = (element.dataset.prefix ?? "") + ago(element.dateTime);
    if (element.textContent !== text) element.textContent = text;
  }
}

/** A digest, shortened, whole on hover and copied by a click. */
export function digest(value) {
  if (!value) return h("span.faint", null, "–");
  const copyIt = () => copy(value, "Digest copied");
  return h(
    "button.digest",
    { type: "button", title: `${value} (click to copy)`, on: { click: copyIt } },
    short(value),
  );
}

/** The hub's words, in which commands stand between backticks. */
export function prose(text) {
  return String(text ?? "")
    .split("`")
    .map((part, at) => (at % 2 ? h("code.said", null, part) : part));
}

/** A heading with what belongs to its right. */
export function section(title, { id, aside, hint } = {}, ...content) {
  return h(
    "section.block",
    { "aria-labelledby": id, "data-key": id },
    h(
      "div.block-head",
      null,
      h("h2", { id }, title),
      hint && h("p.hint", null, hint),
      aside && h("div.block-aside", null, aside),
    ),
    content,
  );
}

/** Pairs of name and value. */
export function facts(pairs, properties) {
  return h(
    "dl.facts",
    properties,
    pairs
      .filter((pair) => pair && pair[1] !== null && pair[1] !== undefined)
      .map(([name, value, note]) =>
        h(
          "div",
          null,
          h("dt", null, name),
          h("dd", null, value, note && h("span.note", null, note)),
        ),
      ),
  );
}

/**
 * A table. `columns`: `{ title, align, hide, head }`; `rows`: `{ key, cells, href, tone }`. With
 * `stack` it becomes a list of cards on a phone, otherwise it scrolls within its own frame.
 */
export function table({ caption, columns, rows, kind, stack = false, sticky = false }) {
  const head = columns.map((column) =>
    h("th", { scope: "col", "data-align": column.align, title: column.help }, column.title),
  );
  const body = rows.map((row) =>
    h(
      "tr",
      { "data-key": row.key, "data-tone": row.tone },
      row.cells.map((cell, at) => {
        const column = columns[at];
        const properties = {
          "data-align": column.align,
          "data-label": typeof column.title === "string" ? column.title : null,
        };
        return column.head
          ? h("th", { scope: "row", ...properties }, cell)
          : h("td", properties, cell);
      }),
    ),
  );
  const made = h(
    "table",
    { class: [kind, stack && "stack", sticky && "sticky"].filter(Boolean).join(" ") },
    caption && h("caption.visually-hidden", null, caption),
    h("thead", null, h("tr", null, head)),
    h("tbody", null, body),
  );
  const frame = stack
    ? { class: "table-frame" }
    : { class: "table-frame scrolls", tabindex: "0", role: "region", "aria-label": caption };
  return h("div", frame, made);
}

/** What to show where there is nothing yet: why, and the command that changes it. */
export function empty(title, text, ...commands) {
  return h(
    "div.empty",
    null,
    h("p.empty-title", null, title),
    text && h("p", null, text),
    commands.map((line) => commandLine(line)),
  );
}

/** A command to copy. */
export function commandLine(line) {
  return h(
    "div.command",
    null,
    h("span.prompt", { "aria-hidden": "true" }, "$"),
    h("code", { tabindex: "0" }, line),
    h(
      "button.icon",
      {
        type: "button",
        title: "Copy the command",
        "aria-label": `Copy the command ${line}`,
        on: { click: () => copy(line, "Command copied") },
      },
      mark("copy"),
    ),
  );
}

/** The page's head: title, what stands beside it, its command and its JSON. */
export function pageHead({ title, over, chips, lead, command, json, actions }) {
  return h(
    "div.page-head",
    null,
    h(
      "div.page-title",
      null,
      over && h("p.over", null, over),
      h("div.title-row", null, h("h1", null, title), chips),
      lead && h("p.lead", null, lead),
      actions,
    ),
    h(
      "div.page-tools",
      null,
      command && commandLine(command),
      json &&
        h(
          "button.quiet",
          { type: "button", title: `GET ${json}`, on: { click: () => showJson(json) } },
          "JSON",
        ),
    ),
  );
}

/** A failed call, with what to do next. */
export function problemBox(problem) {
  return h(
    "div.notice",
    { role: "alert", "data-tone": "bad" },
    mark("bang"),
    h(
      "div",
      null,
      h("p.notice-title", null, problem.title || "something went wrong"),
      problem.detail && h("p", null, prose(problem.detail)),
      problem.hint && h("p.hint", null, "hint: ", prose(problem.hint)),
    ),
  );
}

/** A bar of parts: `[{ tone, value, label }]`; said in words for those who cannot see it. */
export function bar(parts, total, label) {
  const shown = parts.filter((part) => part.value > 0);
  const text = shown.map((part) => `${part.value} ${part.label}`).join(", ");
  return h(
    "div.bar",
    { role: "img", "aria-label": `${label}: ${text || "nothing yet"}` },
    shown.map((part) =>
      h("span.bar-part", {
        "data-tone": part.tone,
        grow: part.value / Math.max(total, 1),
        title: `${part.value} ${part.label}`,
      }),
    ),
  );
}

/** Copies text and says so. */
export async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text);
    announce(said);
    toast(said);
  } catch {
    toast("The browser did not allow copying; select the text instead.", "warn");
  }
}

/** Tells screen readers something without showing it. */
export function announce(text) {
  const place = document.getElementById("announcer");
  if (place.textContent !== text) place.textContent = text;
}

const TOAST_MS = 5000;
const MAX_TOASTS = 4;

/** A short note at the edge. */
export function toast(text, tone = "good") {
  const place = document.getElementById("toasts");
  const note = h(
    "div.toast",
    { "data-tone": tone },
    mark(tone === "good" ? "check" : "bang"),
    h("span", null, text),
  );
  place.append(note);
  while (place.childElementCount > MAX_TOASTS) place.firstElementChild.remove();
  setTimeout(() => note.remove(), TOAST_MS);
}

/** Opens a modal dialog; `content` gets a function that closes it. Gives back when it is closed. */
export function dialog(label, content) {
  return new Promise((resolve) => {
    const box = h("dialog", { "aria-label": label });
    const close = (answer) => {
      box.close();
      box.remove();
      resolve(answer);
    };
    box.append(...[content(close)].flat());
    box.addEventListener("cancel", (event) => (event.preventDefault(), close(undefined)));
    box.addEventListener("click", (event) => event.target === box && close(undefined));
    document.getElementById("dialogs").append(box);
    box.showModal();
  });
}

/** Asks before something that changes devices; true when the person means it. */
export function confirmed({ title, text, command, verb, tone = "busy" }) {
  return dialog(title, (close) =>
    h(
      "div.dialog-body",
      null,
      h("h2", null, title),
      h("p", null, text),
      h("p.hint", null, "The same on the command line:"),
      commandLine(command),
      h(
        "div.dialog-actions",
        null,
        h(
          "button",
          { type: "button", autofocus: true, on: { click: () => close(false) } },
          "Cancel",
        ),
        h(
          "button.primary",
          { type: "button", "data-tone": tone, on: { click: () => close(true) } },
          verb,
        ),
      ),
    ),
  );
}

/** Shows what the API answers on `path`, ready to copy, and how to ask for it. */
export async function showJson(path) {
  let text;
  try {
    text = JSON.stringify(await get(path), null, 2);
  } catch (problem) {
    text = `${problem.title}\n${problem.detail ?? ""}`;
  }
  const curl = `curl -H "Authorization: Bearer $SLM_TOKEN" ${location.origin}${path}`;
  await dialog(`JSON of ${path}`, (close) =>
    h(
      "div.dialog-body.wide",
      null,
      h("h2", null, "JSON"),
      commandLine(curl),
      h("pre.json", { tabindex: "0" }, text),
      h(
        "div.dialog-actions",
        null,
        h("button", { type: "button", on: { click: () => copy(text, "JSON copied") } }, "Copy"),
        h(
          "button.primary",
          { type: "button", autofocus: true, on: { click: () => close() } },
          "Close",
        ),
      ),
    ),
  );
}
