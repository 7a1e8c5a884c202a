// One rollout, live: its waves, its evidence, its decisions, and the hand on the lever.

import { get, identity, post } from "../api.js";
import { h } from "../dom.js";
import { bytes, count, duration, number, plural, seconds } from "../format.js";
import { STATES, failureWords, releaseName, releasePath, sumOf, waves } from "../model.js";
import {
  announce,
  chip,
  commandLine,
  confirmed,
  digest,
  facts,
  mark,
  pageHead,
  prose,
  section,
  table,
  toast,
  when,
} from "../ui.js";
import { progressBar, progressWords } from "./rollouts.js";

const path = ({ rollout }) => `/v1/rollouts/${encodeURIComponent(rollout)}`;
const WAVE_DEVICES = 60;
const DEFAULT_CONFIRM_TIMEOUT_S = 900;

const ACTIONS = {
  pause: {
    verb: "Pause",
    tone: "warn",
    when: ["running"],
    text: "No further device is told. Devices that were told and have not switched yet begin nothing new from their next poll on.",
  },
  resume: {
    verb: "Resume",
    tone: "busy",
    when: ["paused", "halted"],
    text: "Waves go on from where the rollout stands. The failures that halted it are set aside: they no longer count.",
  },
  abort: {
    verb: "Abort",
    tone: "bad",
    when: ["running", "paused", "halted"],
    text: "The rollout ends where it stands. Devices that have confirmed stay on it; those on their way keep what they had.",
  },
  rollback: {
    verb: "Roll back",
    tone: "bad",
    when: ["running", "paused", "halted", "completed", "aborted"],
    text: "Every device of this rollout gets a new generation that names the model it had before.",
  },
};

export default {
  title: ({ rollout }) => `Rollout ${rollout}`,
  kinds: ["rollout", "device"],
  pollMs: 5000,

  async load(parameters, signal, state) {
    const rollout = await get(path(parameters), signal);
    if (state.last && state.last !== rollout.state)
      announce(`The rollout is now ${rollout.state.replace("_", " ")}`);
    state.last = rollout.state;
    rollout.transfers = await get(`${path(parameters)}/transfers`, signal);
    document.title = `${releaseName(rollout)}, ${rollout.state.replace("_", " ")} · slmops`;
    return rollout;
  },

  view(rollout, { parameters, reload }) {
    return [
      pageHead({
        over: h("a", { href: "/rollouts" }, "Rollouts"),
        title: h("a.plain", { href: releasePath(rollout) }, releaseName(rollout)),
        chips: chip(rollout.state, null, { "data-state": rollout.state }),
        lead: [
          "to ",
          h("code", null, rollout.policy.selector),
          ", started ",
          when(rollout.created_at),
          ` by ${rollout.created_by}`,
        ],
        command: `slm rollout why ${rollout.id}`,
        json: path(parameters),
        actions: buttons(rollout, parameters, reload),
      }),
      standing(rollout),
      evidence(rollout),
      waveBoard(rollout),
      travelled(rollout),
      h("div.split", { "data-key": "split" }, timeline(rollout), policy(rollout)),
    ];
  },
};

function buttons(rollout, parameters, reload) {
  const possible = Object.entries(ACTIONS).filter(([, action]) =>
    action.when.includes(rollout.state),
  );
  if (possible.length === 0) return null;
  if (identity()?.role === "viewer") {
    const verbs = possible.map(([, action]) => action.verb.toLowerCase()).join(", ");
    return h("p.hint.actions", null, `To ${verbs}, sign in with an operator's token.`);
  }
  const act = async (name, action) => {
    const sure = await confirmed({
      title: `${action.verb} ${releaseName(rollout)}?`,
      text: action.text,
      command: `slm rollout ${name} ${rollout.id}`,
      verb: action.verb,
      tone: action.tone,
    });
    if (!sure) return;
    try {
      await post(`${path(parameters)}/${name}`);
      toast(`${action.verb}: done`);
      announce(`${action.verb}: done`);
    } catch (problem) {
      toast(
        problem.status === 403
          ? `${action.verb} needs an operator's token.`
          : `${problem.title}: ${problem.detail ?? ""}`,
        "bad",
      );
    }
    reload();
  };
  return h(
    "div.actions",
    { role: "group", "aria-label": "Rollout" },
    possible.map(([name, action]) =>
      h(
        "button",
        {
          type: "button",
          "data-tone": action.tone,
          "data-key": name,
          on: { click: () => act(name, action) },
        },
        action.verb,
      ),
    ),
  );
}

function standing(rollout) {
  const tone = STATES[rollout.state]?.tone ?? "mute";
  const last = rollout.decisions.at(-1);
  const waits = rollout.waiting_for && rollout.state === "running";
  return h(
    "section.standing",
    { "data-tone": tone, "data-key": "standing", "aria-label": "Where it stands" },
    h(
      "div.standing-words",
      null,
      h(
        "p.standing-what",
        null,
        waits
          ? ["Waiting for ", prose(rollout.waiting_for)]
          : (last?.what ?? STATES[rollout.state].label),
      ),
      !waits && rollout.waiting_for && h("p", null, "Waiting for ", prose(rollout.waiting_for)),
      h(
        "p.faint",
        null,
        `wave ${Math.min(rollout.current_wave + 1, rollout.waves)} of ${rollout.waves}, `,
        progressWords(rollout),
        ", changed ",
        when(rollout.updated_at),
      ),
    ),
    progressBar(rollout),
  );
}

function evidence(rollout) {
  const failed = rollout.devices.filter((device) => device.outcome === "failed");
  if (failed.length === 0) return null;
  return section(
    "Why",
    {
      id: "why",
      hint:
        failed.length === 1
          ? "what the failed device measured"
          : `what ${count(failed.length)} failed devices measured`,
    },
    failed.map((device) =>
      h(
        "article.evidence",
        { "data-key": device.device },
        h(
          "header",
          null,
          h(
            "h3",
            null,
            h("a", { href: `/devices/${encodeURIComponent(device.name)}` }, device.name),
          ),
          chip("failed"),
          device.variant && h("code.tag", null, device.variant),
          h("p", null, failureWords(device.failure, bytes)),
          device.finished_at &&
            h("p.faint", null, when(device.finished_at, "went back by itself ")),
        ),
        device.failure?.failure === "probes" &&
          probeTable(device.failure.results, `Probes on ${device.name}`),
      ),
    ),
  );
}

/** Probe results against their floors, failing ones first and marked. */
export function probeTable(results, caption) {
  const sorted = [...results].sort((a, b) => Number(a.passed) - Number(b.passed));
  const values = results.flatMap((result) => [result.value ?? result.floor, result.floor]);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const pad = (high - low || 1) * 0.08;
  const place = (value) => (value - low + pad) / (high - low + 2 * pad);
  return table({
    caption,
    kind: "probes",
    columns: [
      { title: "Probe", head: true },
      { title: "Verdict" },
      { title: "Value", align: "end", help: "mean log-probability, nats per token" },
      { title: "Floor", align: "end" },
      { title: "Margin", align: "end" },
      { title: "Value against floor" },
      { title: "Took", align: "end" },
    ],
    rows: sorted.map((result) => ({
      key: result.name,
      tone: result.passed ? null : "bad",
      cells: [
        h("code", null, result.name),
        result.passed ? chip("confirmed", "passed") : chip("failed", "failed"),
        h("strong", null, result.value === undefined ? "none" : number(result.value)),
        number(result.floor),
        result.value === undefined ? "–" : margin(result.value - result.floor),
        gauge(result, place),
        duration(result.duration_ms),
      ],
    })),
  });
}

const margin = (value) =>
  h("span", { "data-tone": value < 0 ? "bad" : "good" }, value <= 0 ? "" : "+", number(value));

function gauge(result, place) {
  if (result.value === undefined)
    return h("span.faint", null, "the engine failed before there was a value");
  return h(
    "span.gauge",
    {
      "data-tone": result.passed ? "good" : "bad",
      role: "img",
      "aria-label": `${number(result.value)}, ${result.passed ? "above" : "below"} the floor ${number(result.floor)}`,
    },
    h("span.gauge-floor", { grow: place(result.floor) }),
    h("span.gauge-value", { grow: place(result.value) }),
  );
}

function waveBoard(rollout) {
  return section(
    "Waves",
    { id: "waves" },
    h(
      "ol.waves",
      null,
      waves(rollout).map((devices, wave) => {
        const found = rollout.counts[wave] ?? {};
        const total = sumOf(found);
        const state = waveState(rollout, wave, found, total);
        return h(
          "li.wave",
          {
            "data-tone": STATES[state].tone,
            "data-key": `wave-${wave}`,
            "aria-current": wave === rollout.current_wave ? "step" : null,
          },
          h(
            "div.wave-head",
            null,
            h("h3", null, `Wave ${wave + 1}`),
            h("span.faint", null, plural(total, "device")),
            chip(state),
          ),
          h("ul.wave-devices", null, devices.slice(0, WAVE_DEVICES).map(member)),
          total > WAVE_DEVICES && h("p.hint", null, `and ${count(total - WAVE_DEVICES)} more`),
        );
      }),
    ),
  );
}

const WAYS = {
  whole: "whole files",
  delta: "deltas",
  adapter: "adapters alone",
  site: "from their site",
};

/** How the model came to its devices: bytes over the line and time, way by way. */
function travelled({ transfers }) {
  if (!transfers?.devices) return null;
  const share = (way) => way.wan_bytes / Math.max(way.model_bytes, 1);
  const slowest = Math.max(...transfers.ways.map((way) => way.last_confirmed_s), 1);
  const bar = (label, value) =>
    h(
      "span.gauge",
      { role: "img", "aria-label": label },
      h("span.gauge-value", { grow: Math.min(value, 1) }),
    );
  return section(
    "How it travelled",
    { id: "travelled", hint: `of ${plural(transfers.devices, "device")} that said so` },
    table({
      caption: "Bytes over the line and time to confirm, by the way the model came",
      kind: "ways",
      columns: [
        { title: "Way", head: true },
        { title: "Devices", align: "end" },
        { title: "Over the line", align: "end" },
        { title: "of the models' bytes" },
        { title: "Half confirmed", align: "end", help: "from being told" },
        { title: "All confirmed", align: "end", help: "from being told" },
        { title: "Time, half" },
      ],
      rows: transfers.ways.map((way) => ({
        key: way.way,
        cells: [
          WAYS[way.way],
          count(way.devices),
          bytes(way.wan_bytes),
          bar(`${number(share(way) * 100)} % of ${bytes(way.model_bytes)}`, share(way)),
          seconds(way.half_confirmed_s),
          seconds(way.last_confirmed_s),
          bar(seconds(way.half_confirmed_s), way.half_confirmed_s / slowest),
        ],
      })),
    }),
  );
}

function waveState(rollout, wave, found, total) {
  if (found.failed > rollout.policy.max_failures) return "failed";
  if (found.updating) return "updating";
  if ((found.pending ?? 0) === total) return "pending";
  if (!found.pending) return "confirmed";
  return wave === rollout.current_wave ? "updating" : "pending";
}

function member(device) {
  const took =
    device.started_at && device.finished_at
      ? seconds((Date.parse(device.finished_at) - Date.parse(device.started_at)) / 1000)
      : null;
  const note = {
    pending: null,
    updating: device.started_at && when(device.started_at, "told "),
    confirmed: took && `in ${took}`,
    failed: took && `after ${took}`,
    no_fit: `needs ${bytes(device.smallest_bytes)}, offers ${bytes(device.budget_bytes)}`,
    quarantined: "failed here before",
    away: "takes it when it can",
    recalled: "told to keep what it had",
  }[device.outcome];
  return h(
    "li.member",
    { "data-tone": STATES[device.outcome]?.tone, "data-key": device.device, title: device.fit },
    mark(STATES[device.outcome]?.mark),
    h("a", { href: `/devices/${encodeURIComponent(device.name)}` }, device.name),
    device.variant && h("code.tag", null, device.variant),
    h(
      "span.member-state",
      null,
      device.outcome === "pending"
        ? "not told yet"
        : (STATES[device.outcome]?.label ?? device.outcome),
      note && h("span.faint", null, " ", note),
    ),
  );
}

function timeline(rollout) {
  const newestFirst = [...rollout.decisions].reverse();
  return section(
    "Decisions",
    { id: "decisions", hint: "newest first, each with its evidence" },
    newestFirst.length
      ? h(
          "ol.timeline",
          { reversed: true },
          newestFirst.map((decision, at) =>
            h(
              "li",
              {
                "data-key": `${decision.at} ${decision.what}`,
                "data-tone": /halt|fail/.test(decision.what)
                  ? "bad"
                  : /complete|confirm/.test(decision.what)
                    ? "good"
                    : at === 0
                      ? "busy"
                      : "mute",
              },
              h("p.timeline-what", null, decision.what, when(decision.at)),
              decision.because.length > 0 &&
                h(
                  "ul",
                  null,
                  decision.because.map((line) => h("li", null, prose(line))),
                ),
            ),
          ),
        )
      : h("p.faint", null, "None yet."),
  );
}

/** How many devices a wave takes, in words. */
export const waveSize = (wave) =>
  wave === "rest"
    ? "the rest"
    : wave.count !== undefined
      ? plural(wave.count, "device")
      : `${wave.percent} %`;

function policy(rollout) {
  const { policy: asked } = rollout;
  return section(
    "Policy",
    { id: "policy" },
    facts([
      ["Devices", h("code", null, asked.selector)],
      ["Waves", asked.waves.map(waveSize).join(", then ")],
      ["Failures allowed", `${count(asked.max_failures ?? 0)} in a wave`],
      ["Bake", asked.bake_s ? seconds(asked.bake_s) : "none"],
      ["Time to confirm", seconds(asked.confirm_timeout_s)],
      ["Id", h("code", null, rollout.id)],
    ]),
    variantsOf(rollout),
    h("p.hint", null, "Start another with the same policy:"),
    commandLine(startCommand(rollout)),
  );
}

function startCommand({ model, version, policy: asked }) {
  const size = (wave) =>
    wave === "rest" ? "rest" : wave.count !== undefined ? String(wave.count) : `${wave.percent}%`;
  const words = [
    `slm rollout start ${model} ${version} --to '${asked.selector}' --waves ${asked.waves.map(size).join(",")}`,
  ];
  if (asked.max_failures) words.push(`--max-failures ${asked.max_failures}`);
  if (asked.bake_s) words.push(`--bake ${asked.bake_s}s`);
  if (asked.confirm_timeout_s !== DEFAULT_CONFIRM_TIMEOUT_S)
    words.push(`--confirm-timeout ${asked.confirm_timeout_s}s`);
  return words.join(" ");
}

function variantsOf(rollout) {
  const found = new Map();
  for (const device of rollout.devices)
    if (device.variant) found.set(device.variant, device.manifest);
  if (found.size === 0) return null;
  return [
    h("h3.sub", null, "Manifests"),
    facts(
      [...found].map(([variant, manifest]) => [h("code.tag", null, variant), digest(manifest)]),
    ),
  ];
}
