// The fleet at a glance: what runs where, and every device.

import { all, page, releases as allReleases } from "../api.js";
import { h } from "../dom.js";
import { bytes, count, number, plural } from "../format.js";
import { STATES, deviceState, matrix, releaseName, releasePath, sameRelease } from "../model.js";
import { bar, chip, empty, mark, pageHead, prose, section, table, when } from "../ui.js";

const SHOWN_DEVICES = 200;
const NEWEST_ROLLOUTS = 20;
const CELL_STATES = ["confirmed", "updating", "failed"];
const FILTERS = [
  "confirmed",
  "updating",
  "failed",
  "waiting",
  "silent",
  "idle",
  "joined",
  "revoked",
];

export default {
  title: () => "Fleet",
  kinds: ["device", "release", "rollout", "class"],

  async load(_, signal) {
    const [devices, releases, rollouts, classes] = await Promise.all([
      all("/v1/devices", signal),
      allReleases(signal),
      page("/v1/rollouts", undefined, NEWEST_ROLLOUTS, signal),
      all("/v1/classes", signal),
    ]);
    return { devices, releases, rollouts: rollouts.items, classes };
  },

  view({ devices, releases, rollouts, classes }, { state, redraw }) {
    const states = new Map(devices.map((device) => [device.id, deviceState(device)]));
    const head = pageHead({
      title: "Fleet",
      lead: devices.length
        ? `${plural(devices.length, "device")} in ${plural(new Set(devices.map((it) => it.class)).size, "class", "classes")}`
        : "No device has joined yet.",
      command: "slm device list",
      json: "/v1/devices",
    });
    if (devices.length === 0) {
      return [
        head,
        empty(
          "Invite the first device",
          "An invitation is used once. Make one here, then start the agent with it on the device.",
          "slm device invite > invite.txt",
          "slm-agent join invite.txt --state agent --name kitchen --memory-budget 300MB",
        ),
      ];
    }
    return [
      head,
      activeRollouts(rollouts),
      summary(devices, states),
      grid(devices, releases, classes),
      list(devices, states, state, redraw),
    ];
  },
};

function activeRollouts(rollouts) {
  const newest = new Map();
  for (const rollout of rollouts) {
    const known = newest.get(rollout.model);
    if (!known || Date.parse(rollout.created_at) > Date.parse(known.created_at))
      newest.set(rollout.model, rollout);
  }
  const shown = [...newest.values()].filter((it) =>
    ["running", "paused", "halted"].includes(it.state),
  );
  return shown.map((rollout) =>
    h(
      "a.banner",
      {
        href: `/rollouts/${rollout.id}`,
        "data-tone": STATES[rollout.state].tone,
        "data-key": `banner-${rollout.id}`,
      },
      chip(rollout.state),
      h(
        "span.banner-text",
        null,
        h("strong", null, releaseName(rollout)),
        ` wave ${rollout.current_wave + 1} of ${rollout.waves}`,
        rollout.waiting_for && h("span.faint", null, "waiting for ", prose(rollout.waiting_for)),
      ),
      mark("next"),
    ),
  );
}

function summary(devices, states) {
  const tally = {};
  for (const state of states.values()) tally[state] = (tally[state] ?? 0) + 1;
  const sum = (name) =>
    devices.reduce((total, device) => total + (device.report?.telemetry?.[name] ?? 0), 0);
  const always = ["confirmed", "updating", "failed"];
  const shown = FILTERS.filter((name) => always.includes(name) || tally[name]);
  return h(
    "dl.stats",
    { "data-key": "stats" },
    shown.map((name) =>
      h(
        "div.stat",
        { "data-tone": tally[name] ? STATES[name].tone : "mute" },
        h("dt", null, mark(STATES[name].mark), STATES[name].label),
        h("dd", null, count(tally[name] ?? 0)),
      ),
    ),
    h(
      "div.stat.plain",
      null,
      h("dt", null, "speed now"),
      h("dd", null, number(sum("tokens_per_s")), h("small", null, "tokens/s")),
    ),
    h("div.stat.plain", null, h("dt", null, "requests"), h("dd", null, count(sum("requests")))),
    h(
      "div.stat.plain",
      null,
      h("dt", null, "pulled"),
      h("dd", null, bytes(sum("downloaded_bytes"))),
    ),
  );
}

function grid(devices, releases, classes) {
  const { columns, rows } = matrix(devices, releases, classes);
  if (columns.length === 0) {
    return section(
      "Class and release",
      { id: "matrix" },
      empty(
        "No release yet",
        "One command imports a model, makes a variant for each class, measures, signs and rolls it out.",
        "slm ship model.gguf --to all",
      ),
    );
  }
  return section(
    "Class and release",
    {
      id: "matrix",
      hint: "what answers on the devices of each class, what is on its way, and what failed there",
    },
    table({
      caption: "Devices by class and release",
      sticky: true,
      columns: [
        { title: "Class", head: true },
        { title: "Devices", align: "end" },
        ...columns.map((column) => ({
          title: h(
            "a",
            { href: releasePath(column), title: column.name },
            h("span.note", null, column.model),
            h("span", null, column.version),
          ),
        })),
        { title: "No model", align: "end" },
      ],
      rows: rows.map((row) => ({
        key: row.name,
        cells: [
          [
            h("strong", null, row.name),
            row.quantisation &&
              h("span.note", null, `${row.quantisation}, from ${bytes(row.min_memory_bytes)}`),
          ],
          count(row.total),
          ...columns.map((column) =>
            cell(row.cells.get(column.name), row.total, `${row.name}, ${column.name}`),
          ),
          row.without ? count(row.without) : h("span.faint", null, "·"),
        ],
      })),
    }),
    h(
      "p.legend",
      null,
      CELL_STATES.map((name) => chip(name)),
    ),
  );
}

function cell(tally, total, label) {
  if (!tally) return h("span.faint", null, "·");
  const parts = CELL_STATES.filter((name) => tally[name]).map((name) => ({
    name,
    tone: STATES[name].tone,
    value: tally[name],
    label: name,
  }));
  return h(
    "div.cell",
    null,
    h(
      "div.cell-counts",
      null,
      parts.map(({ name, tone, value }) =>
        h(
          "span.tally",
          { "data-tone": tone, title: `${value} ${name}` },
          mark(STATES[name].mark),
          count(value),
          h("span.visually-hidden", null, ` ${name}`),
        ),
      ),
    ),
    bar(parts, total, label),
  );
}

function list(devices, states, state, redraw) {
  const words = (state.words ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const shown = devices
    .filter((device) => !state.only || states.get(device.id) === state.only)
    .filter((device) => {
      const text = [
        device.name,
        device.id,
        device.class,
        device.site,
        states.get(device.id),
        running(device),
        ...Object.entries(device.labels).map((label) => label.join("=")),
      ]
        .join(" ")
        .toLowerCase();
      return words.every((word) => text.includes(word));
    })
    .sort(
      (a, b) => rank(states.get(a.id)) - rank(states.get(b.id)) || a.name.localeCompare(b.name),
    );
  const present = FILTERS.filter((name) => [...states.values()].includes(name));
  const filter = h(
    "div.filter",
    { role: "search", "data-key": "filter" },
    h("label.visually-hidden", { for: "filter" }, "Filter devices"),
    h("input", {
      id: "filter",
      type: "search",
      placeholder: "Filter by name, class, label …",
      autocomplete: "off",
      spellcheck: "false",
      on: { input: (event) => ((state.words = event.target.value), redraw()) },
    }),
    present.length > 1 &&
      h(
        "div.choices",
        { role: "group", "aria-label": "State" },
        present.map((name) =>
          h(
            "button.choice",
            {
              type: "button",
              "data-tone": STATES[name].tone,
              "aria-pressed": String(state.only === name),
              on: { click: () => ((state.only = state.only === name ? null : name), redraw()) },
            },
            mark(STATES[name].mark),
            STATES[name].label,
          ),
        ),
      ),
  );
  const rows = shown.slice(0, SHOWN_DEVICES).map((device) => {
    const telemetry = device.report?.telemetry;
    const used = telemetry?.worker_memory_bytes ?? 0;
    const budget = device.facts.memory_budget_bytes;
    const serving = device.report?.running;
    const going =
      device.desired.model && !sameRelease(device.desired.model, serving)
        ? device.desired.model
        : null;
    return {
      key: device.id,
      cells: [
        h("a.strong", { href: `/devices/${encodeURIComponent(device.name)}` }, device.name),
        chip(states.get(device.id)),
        [h("span", null, device.class), device.site && h("span.note", null, device.site)],
        [
          serving
            ? h("span", null, releaseName(serving), " ", h("code.tag", null, serving.variant))
            : h("span.faint", null, "nothing"),
          going &&
            h("span.note", null, "→ ", releaseName(going), " ", h("code.tag", null, going.variant)),
        ],
        used
          ? h(
              "div.meter-cell",
              null,
              h("span", null, `${bytes(used)} `, h("span.faint", null, `of ${bytes(budget)}`)),
              bar(
                [{ tone: used > budget ? "bad" : "good", value: used, label: "bytes used" }],
                budget,
                "memory",
              ),
            )
          : h("span.faint", null, `up to ${bytes(budget)}`),
        telemetry ? number(telemetry.tokens_per_s) : "–",
        when(device.last_seen),
      ],
    };
  });
  return section(
    "Devices",
    { id: "devices", aside: filter },
    rows.length
      ? table({
          caption: "Devices",
          stack: true,
          columns: [
            { title: "Name", head: true },
            { title: "State" },
            { title: "Class" },
            { title: "Answers with" },
            { title: "Memory" },
            { title: "Tokens/s", align: "end" },
            { title: "Last seen", align: "end" },
          ],
          rows,
        })
      : empty("No device matches", "Change the filter, or clear it."),
    shown.length > SHOWN_DEVICES &&
      h(
        "p.hint",
        null,
        `The first ${SHOWN_DEVICES} of ${count(shown.length)} are shown; filter to see others.`,
      ),
    devices.complete === false &&
      h(
        "p.hint",
        null,
        "The fleet is larger than this page loads; the command line lists all of it.",
      ),
  );
}

const running = (device) =>
  device.report?.running
    ? `${releaseName(device.report.running)} ${device.report.running.variant}`
    : "";
const ORDER = ["failed", "waiting", "updating", "joined", "silent", "idle", "confirmed", "revoked"];
const rank = (state) => ORDER.indexOf(state);
