// The fleet at a glance: what runs where, and every device.

import { all, get, page, releases as allReleases } from "../api.js";
import { h } from "../dom.js";
import { bytes, count, number, plural, seconds } from "../format.js";
import { STATES, deviceState, matrix, releaseName, releasePath, sameRelease } from "../model.js";
import {
  bar,
  chip,
  commandLine,
  empty,
  mark,
  pageHead,
  prose,
  section,
  table,
  when,
} from "../ui.js";

const SHOWN_DEVICES = 100;
const FIRST_PAGE = { before: 0 };
const SHOWN_GROUPS = 8;
const NEWEST_ROLLOUTS = 20;
/** People type faster than they want answers. */
const TYPING_MS = 250;
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

  async load(_, signal, state) {
    state.filter ??= filterOfAddress();
    // Where the pages begin that led to the one that is shown, which is the last.
    state.pages ??= [FIRST_PAGE];
    const { filter, pages } = state;
    const filtered = Object.keys(filter).length > 0;
    const [summary, matching, devices, releases, rollouts, classes] = await Promise.all([
      get("/v1/fleet/summary", signal),
      filtered ? get(`/v1/fleet/summary?${new URLSearchParams(filter)}`, signal) : null,
      page("/v1/devices", pages.at(-1).cursor, SHOWN_DEVICES, signal, filter),
      allReleases(signal),
      page("/v1/rollouts", undefined, NEWEST_ROLLOUTS, signal),
      all("/v1/classes", signal),
    ]);
    const found = (matching ?? summary).devices;
    return { summary, found, devices, releases, rollouts: rollouts.items, classes };
  },

  view({ summary, found, devices, releases, rollouts, classes }, { state, reload }) {
    const used = summary.classes.filter((it) => it.devices > 0).length;
    const head = pageHead({
      title: "Fleet",
      lead: summary.devices
        ? `${plural(summary.devices, "device")} in ${plural(used, "class", "classes")}`
        : "No device has joined yet.",
      command: "slm fleet summary",
      json: "/v1/fleet/summary",
    });
    if (summary.devices === 0) {
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
    const show = (filter) => {
      state.filter = filter;
      state.pages = [FIRST_PAGE];
      const query = new URLSearchParams(filter).toString();
      history.replaceState(null, "", location.pathname + (query ? `?${query}` : ""));
      reload();
    };
    return [
      head,
      activeRollouts(rollouts),
      figures(summary),
      grid(summary, releases, classes),
      summary.groups.some((group) => group.value) && places(summary, state, show),
      list(summary, found, devices, { state, reload, show }),
    ];
  },
};

/** The filter that the address holds, so that a view can be kept and sent. */
function filterOfAddress() {
  const given = new URLSearchParams(location.search);
  const known = ["search", "selector", "state", "model", "version", "orders"];
  return Object.fromEntries([...given].filter(([name, value]) => known.includes(name) && value));
}

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

function figures({ states, tokens_per_s: speed, requests, downloaded_bytes: pulled }) {
  const always = ["confirmed", "updating", "failed"];
  const shown = FILTERS.filter((name) => always.includes(name) || states[name]);
  return h(
    "dl.stats",
    { "data-key": "stats" },
    shown.map((name) =>
      h(
        "div.stat",
        { "data-tone": states[name] ? STATES[name].tone : "mute" },
        h("dt", null, mark(STATES[name].mark), STATES[name].label),
        h("dd", null, count(states[name] ?? 0)),
      ),
    ),
    h(
      "div.stat.plain",
      null,
      h("dt", null, "speed now"),
      h("dd", null, number(speed), h("small", null, "tokens/s")),
    ),
    h("div.stat.plain", null, h("dt", null, "requests"), h("dd", null, count(requests))),
    h("div.stat.plain", null, h("dt", null, "pulled"), h("dd", null, bytes(pulled))),
  );
}

function grid(summary, releases, classes) {
  const { columns, rows } = matrix(summary, releases, classes);
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

const statesBar = (states, total, label) =>
  bar(
    FILTERS.filter((name) => states[name]).map((name) => ({
      tone: STATES[name].tone,
      value: states[name],
      label: STATES[name].label,
    })),
    total,
    label,
  );

/** Where the devices are, and when they were last heard of. */
function places(summary, state, show) {
  const shown = summary.groups.slice(0, state.allGroups ? undefined : SHOWN_GROUPS);
  const left = summary.groups.length - shown.length;
  const sites = section(
    "Sites",
    { id: "sites" },
    table({
      caption: "Devices by site",
      columns: [{ title: "Site", head: true }, { title: "Devices", align: "end" }, { title: "State" }],
      rows: shown.map(({ value, devices, states }) => ({
        key: value ?? "-",
        cells: [
          value
            ? h(
                "button.link",
                { type: "button", on: { click: () => show({ selector: `site=${value}` }) } },
                value,
              )
            : h("span.faint", null, "no site"),
          count(devices),
          h("div.level-bar", null, statesBar(states, devices, value ?? "no site")),
        ],
      })),
    }),
    left > 0 &&
      h(
        "div.more",
        null,
        h(
          "button",
          { type: "button", on: { click: () => ((state.allGroups = true), show(state.filter)) } },
          `${count(left)} more sites`,
        ),
      ),
    summary.more_groups > 0 &&
      h("p.hint", null, `${count(summary.more_groups)} more sites have fewer devices.`),
  );
  const heard = section(
    "Last heard of",
    { id: "heard" },
    h(
      "div.levels",
      null,
      summary.last_seen.map(({ within_s: within, devices }, at) =>
        h(
          "div.level.wide",
          { "data-tone": at ? (devices ? "warn" : "mute") : "good", "data-key": within ?? "rest" },
          h("span.level-name", null, within ? `within ${seconds(within)}` : "longer ago"),
          h(
            "div.level-track",
            null,
            h("span.level-fill", { grow: devices / Math.max(summary.devices, 1) }),
          ),
          h("span.level-value", null, count(devices)),
        ),
      ),
    ),
    h(
      "p.hint",
      null,
      `${plural(summary.pinned, "device")} pinned, ${count(summary.excluded)} excluded; `,
      `${plural(summary.quarantined, "package")} quarantined.`,
    ),
  );
  return h("div.split", { "data-key": "places" }, sites, heard);
}

function list(summary, found, { items, cursor }, { state, reload, show }) {
  const { filter, pages } = state;
  const put = (name, value) => {
    const { [name]: _, ...others } = filter;
    show(value ? { ...others, [name]: value } : others);
  };
  const typed = (event) => {
    const words = event.target.value.trim();
    clearTimeout(state.typing);
    state.typing = setTimeout(() => put("search", words), TYPING_MS);
  };
  const present = FILTERS.filter((name) => summary.states[name] || filter.state === name);
  const others = Object.entries(filter).filter(([name]) => !["search", "state"].includes(name));
  const tools = h(
    "div.filter",
    { role: "search", "data-key": "filter" },
    h("label.visually-hidden", { for: "filter" }, "Search devices"),
    h("input", {
      id: "filter",
      type: "search",
      placeholder: "Search name, class, label …",
      autocomplete: "off",
      spellcheck: "false",
      maxlength: 200,
      value: filter.search ?? "",
      on: { input: typed },
    }),
    others.map(([name, value]) =>
      h(
        "button.choice",
        {
          type: "button",
          "data-key": name,
          "data-tone": "busy",
          "aria-pressed": "true",
          title: `Show devices whatever their ${name}`,
          on: { click: () => put(name, null) },
        },
        mark("cross"),
        name === "selector" ? value : `${name} ${value}`,
      ),
    ),
    present.length > 1 &&
      h(
        "div.choices",
        { role: "group", "aria-label": "State" },
        present.map((name) =>
          h(
            "button.choice",
            {
              type: "button",
              "data-key": name,
              "data-tone": STATES[name].tone,
              "aria-pressed": String(filter.state === name),
              on: { click: () => put("state", filter.state === name ? null : name) },
            },
            mark(STATES[name].mark),
            STATES[name].label,
          ),
        ),
      ),
  );
  const rows = items.map((device) => {
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
        chip(deviceState(device)),
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
  const { before } = pages.at(-1);
  const after = before + rows.length;
  const turn = (wanted) => {
    state.pages = wanted;
    reload();
  };
  return section(
    "Devices",
    { id: "devices", aside: tools },
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
      : empty("No device matches", "Change the search, or clear it."),
    h("div.as-command", null, commandLine(listCommand(filter))),
    (cursor || before > 0) &&
      h(
        "nav.pages",
        { "aria-label": "Pages of devices", "data-key": "pages" },
        h(
          "button",
          {
            type: "button",
            disabled: before === 0,
            on: { click: () => turn(pages.slice(0, -1)) },
          },
          "Previous",
        ),
        h(
          "span",
          null,
          `${count(Math.min(before + 1, after))} to ${count(after)} of ${count(found)}`,
        ),
        h(
          "button",
          {
            type: "button",
            disabled: !cursor,
            on: { click: () => turn([...pages, { cursor, before: after }]) },
          },
          "Next",
        ),
      ),
  );
}

/** The command that lists the same devices. */
function listCommand({ search, selector, state, model, version, orders }) {
  const quoted = (text) => (/^[\w.=/@-]+$/.test(text) ? text : `'${text.replaceAll("'", "")}'`);
  return [
    "slm device list",
    ...(search ?? "").split(/\s+/).filter(Boolean).map(quoted),
    selector && `--to ${quoted(selector)}`,
    state && `--state ${quoted(state)}`,
    model && `--running ${quoted(version ? `${model}@${version}` : model)}`,
    orders && `--${quoted(orders)}`,
  ]
    .filter(Boolean)
    .join(" ");
}
