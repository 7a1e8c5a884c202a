// Starts the page: signs in, routes, loads, draws, and draws again when the hub says that
// something changed. Each page is a module in `pages/` with:
//   title(parameters), command(parameters), json(parameters)   for the head
//   kinds        which change notices concern it; pollMs        how often to look all the same
//   load(parameters, signal, state)                             its data
//   view(data, { parameters, state, redraw, reload })           its content

import * as api from "./api.js";
import { h, patch } from "./dom.js";
import { follow } from "./live.js";
import audit from "./pages/audit.js";
import channels from "./pages/channels.js";
import device from "./pages/device.js";
import fleet from "./pages/fleet.js";
import held from "./pages/held.js";
import release from "./pages/release.js";
import releases from "./pages/releases.js";
import rollout from "./pages/rollout.js";
import rollouts from "./pages/rollouts.js";
import webhooks from "./pages/webhooks.js";
import { announce, commandLine, mark, problemBox, tickTimes } from "./ui.js";

const ROUTES = [
  [/^\/(?:fleet)?$/, fleet],
  [/^\/devices\/(?<device>[^/]+)$/, device],
  [/^\/releases$/, releases],
  [/^\/releases\/(?<model>[^/]+)\/(?<version>[^/]+)$/, release],
  [/^\/rollouts$/, rollouts],
  [/^\/rollouts\/(?<rollout>[^/]+)$/, rollout],
  [/^\/channels$/, channels],
  [/^\/held$/, held],
  [/^\/webhooks$/, webhooks],
  [/^\/audit$/, audit],
];
const SECTIONS = [
  ["/", "Fleet", /^\/(fleet|devices\/.*)?$/],
  ["/releases", "Releases", /^\/releases/],
  ["/rollouts", "Rollouts", /^\/rollouts/],
  ["/channels", "Channels", /^\/channels/],
  ["/held", "Held back", /^\/held/],
  ["/webhooks", "Webhooks", /^\/webhooks/],
  ["/audit", "Audit", /^\/audit/],
];
/** Notices come in bursts (a rollout step changes devices, rollout and log): one look for all. */
const SETTLE_MS = 150;
/** A busy fleet changes all the time; looking takes at most this share of it. */
const REST_PER_LOOK = 4;
const LONGEST_REST_MS = 5000;
const TICK_MS = 1000;
/** Without notices the page still looks this often. */
const POLL_MS = 20_000;

const main = document.getElementById("content");
const top = document.getElementById("top");
const foot = document.getElementById("foot");

let current = null;
let live = { state: "connecting" };
let unfollow = null;

function route(path) {
  for (const [pattern, page] of ROUTES) {
    const match = pattern.exec(path);
    if (!match) continue;
    const groups = Object.entries(match.groups ?? {});
    try {
      return [
        page,
        Object.fromEntries(groups.map(([name, text]) => [name, decodeURIComponent(text)])),
      ];
    } catch {
      return null;
    }
  }
  return null;
}

function open({ focus = true } = {}) {
  current?.abort.abort();
  clearTimeout(current?.timer);
  drawTop();
  if (!api.signedIn()) {
    current = null;
    drawSignIn();
    return;
  }
  const found = route(location.pathname);
  if (!found) {
    current = null;
    document.title = "Not found · slmops";
    patch(
      main,
      h(
        "div.empty",
        null,
        h("p.empty-title", null, "No such page"),
        h("p", null, h("a", { href: "/" }, "Back to the fleet")),
      ),
    );
    return;
  }
  const [page, parameters] = found;
  current = {
    page,
    parameters,
    state: {},
    abort: new AbortController(),
    data: undefined,
    problem: null,
  };
  document.title = `${page.title(parameters)} · slmops`;
  main.setAttribute("aria-busy", "true");
  patch(main, skeleton());
  main.firstElementChild?.setAttribute("data-key", "skeleton");
  window.scrollTo(0, 0);
  if (focus) main.focus({ preventScroll: true });
  load();
}

function skeleton() {
  return h(
    "div.skeleton",
    { "aria-hidden": "true" },
    h("div.ghost.wide"),
    h("div.ghost"),
    h("div.ghost.tall"),
  );
}

async function load() {
  const mine = current;
  if (!mine) return;
  clearTimeout(mine.timer);
  mine.soon = false;
  if (mine.loading) {
    mine.again = true;
    return;
  }
  mine.loading = true;
  const started = performance.now();
  try {
    if (!api.identity()) {
      await api.whoami(mine.abort.signal);
      drawTop();
    }
    mine.data = await mine.page.load(mine.parameters, mine.abort.signal, mine.state);
    mine.problem = null;
  } catch (problem) {
    if (mine !== current) return;
    if (problem.status === 401) {
      api.signOut();
      stopFollowing();
      current = null;
      drawTop();
      drawSignIn("That token is unknown to the hub, or has expired.");
      return;
    }
    mine.problem = problem;
    if (!(problem instanceof api.Problem)) console.error(problem);
  } finally {
    mine.loading = false;
    mine.looked = performance.now();
    mine.took = mine.looked - started;
  }
  if (mine !== current) return;
  draw();
  const wait = mine.again ? settle() : (mine.page.pollMs ?? POLL_MS);
  mine.again = false;
  mine.timer = setTimeout(load, wait);
}

function draw() {
  const { page, parameters, state, data, problem } = current;
  main.removeAttribute("aria-busy");
  const content =
    data === undefined ? [] : page.view(data, { parameters, state, redraw: draw, reload: load });
  patch(
    main,
    h("div.page", { "data-key": location.pathname }, problem && problemBox(problem), content),
  );
  tickTimes(main);
  patch(
    foot,
    h("span", null, "slmops"),
    h("span", null, "Nothing on this page comes from another host."),
    h("a", { href: "/openapi.json" }, "API"),
  );
}

function settle() {
  const rest = Math.min((current.took ?? 0) * REST_PER_LOOK, LONGEST_REST_MS);
  return Math.max(SETTLE_MS, (current.looked ?? 0) + rest - performance.now());
}

function onChange({ kind }) {
  if (!kind || kind === "*" || kind === "release") api.forgetReleases();
  if (!current) return;
  const wanted = current.page.kinds;
  const known = kind && kind !== "*" && wanted;
  if (known && !wanted.some((name) => kind.startsWith(name))) return;
  // The first of a burst sets the time; those after it must not put it off.
  if (current.soon) return;
  current.soon = true;
  clearTimeout(current.timer);
  current.timer = setTimeout(load, settle());
}

function startFollowing() {
  if (unfollow || !api.signedIn()) return;
  unfollow = follow(onChange, (state, retryAt) => {
    const before = live.state;
    live = { state, retryAt };
    drawTop();
    if (state === "reconnecting" && before === "live") announce("Connection lost, reconnecting");
    if (state === "live" && before === "reconnecting") announce("Connected again");
  });
}

function stopFollowing() {
  unfollow?.();
  unfollow = null;
  live = { state: "connecting" };
}

const THEMES = [
  ["auto", "Theme: as the system", "auto"],
  ["light", "Theme: light", "sun"],
  ["dark", "Theme: dark", "moon"],
];

function nextTheme() {
  const now = document.documentElement.dataset.theme ?? "auto";
  const next = THEMES[(THEMES.findIndex(([name]) => name === now) + 1) % THEMES.length][0];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    if (next === "auto") localStorage.removeItem("slm-theme");
    else localStorage.setItem("slm-theme", next);
  } catch {
    // No storage: the choice lasts as long as the page.
  }
  drawTop();
}

function drawTop() {
  const signedIn = api.signedIn();
  const path = location.pathname;
  const who = signedIn && api.identity();
  const links = SECTIONS.map(([href, name, pattern]) =>
    h("a", { href, "aria-current": pattern.test(path) ? "page" : null }, name),
  );
  const theme = THEMES.find(
    ([name]) => name === (document.documentElement.dataset.theme ?? "auto"),
  );
  const words = { connecting: "connecting", live: "live", reconnecting: "reconnecting" };
  patch(
    top,
    h(
      "a.brand",
      { href: "/", "aria-label": "slmops, to the fleet" },
      h("img", { src: "/assets/logo.svg", alt: "", width: 26, height: 26 }),
      h("span", null, "slmops"),
    ),
    signedIn && h("nav", { "aria-label": "Pages" }, links),
    h(
      "div.top-tools",
      null,
      signedIn &&
        h(
          "span.live",
          {
            "data-state": live.state,
            role: "status",
            title: live.state === "live" ? "Changes show by themselves" : "Looking for the hub",
          },
          h("span.dot", { "aria-hidden": "true" }),
          h("span", null, words[live.state]),
        ),
      h(
        "button.icon",
        { type: "button", title: theme[1], "aria-label": theme[1], on: { click: nextTheme } },
        mark(theme[2]),
      ),
      who &&
        h(
          "span.who",
          { title: `signed in with the token ${who.name}, role ${who.role}` },
          who.name,
          who.name !== who.role && h("small", null, ` ${who.role}`),
        ),
      signedIn &&
        h(
          "button.icon",
          { type: "button", title: "Sign out", "aria-label": "Sign out", on: { click: leave } },
          mark("leave"),
        ),
    ),
  );
}

function leave() {
  api.signOut();
  stopFollowing();
  open();
}

function drawSignIn(message) {
  document.title = "Sign in · slmops";
  main.removeAttribute("aria-busy");
  const submit = (event) => {
    event.preventDefault();
    const secret = event.target.elements.token.value.trim();
    if (!secret) return;
    api.signIn(secret);
    startFollowing();
    open();
  };
  patch(
    main,
    h(
      "div.sign-in",
      { "data-key": "sign-in" },
      h("img", { src: "/assets/logo.svg", alt: "", width: 52, height: 52 }),
      h("h1", null, "Sign in"),
      h("p.lead", null, "The hub shows its fleet to those who hold an operator token."),
      message &&
        h(
          "p.notice",
          { role: "alert", "data-tone": "bad" },
          mark("bang"),
          h("span", null, message),
        ),
      h(
        "form",
        { on: { submit } },
        h("label", { for: "token" }, "Token"),
        h("input", {
          id: "token",
          name: "token",
          type: "password",
          autocomplete: "off",
          spellcheck: "false",
          placeholder: "slmt_…",
          required: true,
        }),
        h("button.primary", { type: "submit" }, "Sign in"),
      ),
      h("p.hint", null, "The link that slm up prints signs you in by itself. Or make a token:"),
      commandLine("slm token create dashboard --role viewer"),
    ),
  );
  patch(foot);
  document.getElementById("token")?.focus();
}

document.addEventListener("click", (event) => {
  if (event.defaultPrevented || event.button !== 0) return;
  if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const link = event.target.closest?.("a[href]");
  if (!link || link.target || link.origin !== location.origin) return;
  if (link.hash && link.pathname === location.pathname) return;
  if (!route(link.pathname)) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  open();
});
window.addEventListener("popstate", () => open());
window.addEventListener("hashchange", () => {
  if (!location.hash.startsWith("#token=")) return;
  api.takeTokenFromAddress();
  stopFollowing();
  startFollowing();
  open();
});
// A browser opens few connections to one host: a page that nobody sees gives its own back.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    stopFollowing();
  } else {
    startFollowing();
    load();
  }
});
window.addEventListener("pagehide", stopFollowing);
window.addEventListener("pageshow", (event) => {
  if (event.persisted) startFollowing();
});
setInterval(() => tickTimes(main), TICK_MS);

api.takeTokenFromAddress();
startFollowing();
open({ focus: false });
