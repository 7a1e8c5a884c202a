// One device: what it is, what it should be, what it is doing, and how that came about.

import { get, releases as allReleases } from "../api.js";
import { sparkline } from "../chart.js";
import { h } from "../dom.js";
import { bytes, clock, count, duration, number, percent, plural, seconds } from "../format.js";
import {
  STEPS,
  byManifest,
  deviceState,
  differences,
  failureWords,
  isWaiting,
  progress,
  releaseName,
  releasePath,
  sameRelease,
} from "../model.js";
import {
  bar,
  chip,
  digest,
  empty,
  facts,
  mark,
  pageHead,
  prose,
  section,
  table,
  when,
} from "../ui.js";
import { probeTable } from "./rollout.js";

const path = ({ device }) => `/v1/devices/${encodeURIComponent(device)}`;
const SAMPLES = 240;
const WAIT_WORDS = {
  network: "the network or the hub does not answer",
  disk_full: "the disk is full",
  storage: "the state folder cannot be written",
  held: "the rollout is held",
  not_before: "its time has not come",
  hours: "it is outside of its hours",
  clock: "it does not know what time it is",
  metered: "its link is metered",
};

/** Speeds seen while this tab is open, by device: `Map id → [{ at, value }]`. */
const speeds = new Map();

export default {
  title: ({ device }) => device,
  kinds: ["device", "rollout", "blueprint", "class", "release"],
  pollMs: 3000,

  async load(parameters, signal) {
    const optional = (promise, none) =>
      promise.catch((problem) =>
        problem.status === 404 || problem.status === 403 ? none : Promise.reject(problem),
      );
    const [device, explanation, history, releases] = await Promise.all([
      get(path(parameters), signal),
      optional(get(`${path(parameters)}/explain`, signal), null),
      optional(get(`${path(parameters)}/history`, signal), []),
      optional(allReleases(signal), []),
    ]);
    sample(device);
    return {
      device,
      explanation,
      history: Array.isArray(history) ? history : (history.items ?? []),
      releases,
    };
  },

  view({ device, explanation, history, releases }, { parameters }) {
    const { report, desired } = device;
    const state = deviceState(device);
    return [
      pageHead({
        over: h("a", { href: "/" }, "Fleet"),
        title: device.name,
        chips: [chip(state), device.revoked && state !== "revoked" && chip("revoked")],
        lead: [
          h("span", null, `class ${device.class}`, device.site && `, site ${device.site}`),
          ", seen ",
          when(device.last_seen),
        ],
        command: `slm device show ${device.name}`,
        json: path(parameters),
      }),
      orders(device),
      stepper(device),
      failureNotice(device),
      h(
        "div.trio",
        { "data-key": "trio" },
        speed(device),
        memory(device, explanation),
        models(device),
      ),
      h("div.split", { "data-key": "split" }, configuration(desired, report), about(device)),
      report?.probes?.length
        ? section(
            "Probes",
            { id: "probes", hint: "the newest results of the model that answers" },
            probeTable(report.probes, "Probe results"),
          )
        : null,
      explained(device, explanation),
      rejected(report, releases),
      past(history, device),
    ];
  },
};

function sample(device) {
  const telemetry = device.report?.telemetry;
  if (!telemetry) return;
  const known = speeds.get(device.id) ?? [];
  known.push({ at: Date.now(), value: telemetry.tokens_per_s });
  speeds.set(device.id, known.slice(-SAMPLES));
}

function stepper(device) {
  const { desired, report } = device;
  if (!desired.model) {
    return h(
      "section.standing",
      { "data-tone": "mute", "data-key": "steps" },
      h("p.standing-what", null, "Nothing is desired of this device yet"),
      h("p.faint", null, prose(desired.reason)),
    );
  }
  const at = progress(device);
  const steps = STEPS.map((name, index) => {
    const place = { key: "next", word: "to come" };
    if (at.told ? index === 0 : index <= at.step && index > 0)
      Object.assign(place, { key: "done", word: "done" });
    if (index === 0 && !at.told) Object.assign(place, { key: "done", word: "done" });
    const next = at.told ? 1 : at.step + 1;
    if (index === next && !at.failed && !at.waiting)
      Object.assign(place, { key: "now", word: "under way" });
    if (at.failed && index === at.failedAt) Object.assign(place, { key: "failed", word: "failed" });
    if (at.waiting && index === Math.max(next, 1)) Object.assign(place, { key: "wait", word: "waiting" });
    return { name, ...place };
  });
  const marks = { done: "check", now: "arrow", failed: "cross", wait: "pause", next: "ring" };
  const loading = at.downloading
    ? h(
        "p.faint",
        null,
        `downloading ${bytes(at.done)} of ${bytes(at.total)} `,
        bar([{ tone: "busy", value: at.done, label: "bytes" }], at.total, "download"),
      )
    : null;
  return h(
    "section.standing",
    {
      "data-tone": at.failed ? "bad" : at.step === STEPS.length - 1 ? "good" : "busy",
      "data-key": "steps",
      "aria-label": "Progress to the desired state",
    },
    h(
      "p.standing-what",
      null,
      h("a.plain", { href: releasePath(desired.model) }, releaseName(desired.model)),
      " ",
      h("code.tag", null, desired.model.variant),
      h("span.faint", null, ` generation ${count(desired.generation)}`),
    ),
    h(
      "ol.steps",
      null,
      steps.map((step) =>
        h(
          "li",
          { "data-place": step.key, "aria-current": step.key === "now" ? "step" : null },
          h("span.step-mark", null, mark(marks[step.key])),
          h("span", null, step.name),
          h("span.visually-hidden", null, `: ${step.word}`),
        ),
      ),
    ),
    loading,
    report &&
      isWaiting(report) &&
      h(
        "p",
        { "data-tone": "warn" },
        `waiting: ${WAIT_WORDS[report.cause] ?? report.cause}`,
        report.until ? `, until ${report.until}` : "; the device goes on by itself",
      ),
    desired.reason && h("p.faint", null, prose(desired.reason)),
  );
}

/** What operators decided about it, over all rollouts. */
function orders({ name, orders: given }) {
  const notice = (key, title, order, undo) =>
    h(
      "div.notice",
      { "data-tone": "warn", "data-key": key },
      mark("pause"),
      h(
        "div",
        null,
        h("p.notice-title", null, title),
        h("p", null, `“${order.reason}”`),
        h("p.hint", null, `by ${order.by}, `, when(order.at), "; to end it: ", h("code.said", null, undo)),
      ),
    );
  return [
    given?.pin &&
      notice("pin", `Pinned to ${releaseName(given.pin)}`, given.pin, `slm device unpin ${name}`),
    given?.exclusion &&
      notice(
        "exclusion",
        "Takes no part in rollouts",
        given.exclusion,
        `slm device include ${name}`,
      ),
  ];
}

function failureNotice({ report }) {
  if (report?.phase !== "rolled_back") return null;
  const { failure } = report;
  return h(
    "div.notice",
    { "data-tone": "bad", "data-key": "failure" },
    mark("back"),
    h(
      "div",
      null,
      h(
        "p.notice-title",
        null,
        `Went back by itself${report.running ? ` and answers with ${releaseName(report.running)}` : ""}`,
      ),
      h("p", null, failureWords(failure, bytes)),
      failure.failure === "probes" && probeTable(failure.results, "Probes that decided"),
    ),
  );
}

function speed(device) {
  const telemetry = device.report?.telemetry;
  if (!telemetry) return section("Speed", { id: "speed" }, h("p.faint", null, "No report yet."));
  return section(
    "Speed",
    { id: "speed" },
    h(
      "p.figure",
      null,
      h("span", null, number(telemetry.tokens_per_s)),
      h("small", null, "tokens/s"),
    ),
    sparkline(speeds.get(device.id) ?? [], { unit: "tokens/s", label: "Tokens per second" }),
    facts([
      [
        "First token",
        telemetry.time_to_first_token_ms ? duration(telemetry.time_to_first_token_ms) : "–",
      ],
      ["Requests", count(telemetry.requests)],
      ["Errors", count(telemetry.errors)],
      ["Generated", `${count(telemetry.generated_tokens)} tokens`],
      ["Crashes", count(telemetry.worker_crashes)],
    ]),
  );
}

function memory(device, explanation) {
  const { facts: known, report, desired } = device;
  const budget = known.memory_budget_bytes;
  const telemetry = report?.telemetry;
  const predicted = desired.model?.predicted_memory_bytes;
  const used = telemetry?.worker_memory_bytes ?? 0;
  const peak = telemetry?.worker_peak_memory_bytes ?? 0;
  const largest = Math.max(budget, peak, predicted ?? 0) * 1.04;
  const row = (label, value, tone) =>
    h(
      "div.level",
      { "data-tone": tone },
      h("span.level-name", null, label),
      h(
        "span.level-track",
        null,
        h("span.level-fill", { grow: value / largest }),
        h("span.level-budget", { grow: budget / largest, title: `budget ${bytes(budget)}` }),
      ),
      h("span.level-value", null, bytes(value)),
    );
  const error = predicted && used ? (predicted - used) / used : null;
  return section(
    "Memory",
    { id: "memory" },
    h(
      "p.figure",
      null,
      h("span", null, used ? bytes(used) : "none"),
      h("small", null, `of ${bytes(budget)} budget`),
    ),
    h(
      "div.levels",
      {
        role: "img",
        "aria-label": `worker ${bytes(used)}, peak ${bytes(peak)}, predicted ${bytes(predicted)}, budget ${bytes(budget)}`,
      },
      row("now", used, used > budget ? "bad" : "good"),
      row("peak", peak, peak > budget ? "bad" : "good"),
      predicted ? row("predicted", predicted, "busy") : null,
    ),
    facts([
      error !== null && ["Prediction", `${error > 0 ? "+" : ""}${percent(error)} of measured`],
      ["Total memory", bytes(known.memory_bytes)],
      ["Disk free", bytes(known.disk_free_bytes)],
      ["Pulled", telemetry ? bytes(telemetry.downloaded_bytes) : "–"],
    ]),
    explanation?.fit?.length
      ? h(
          "details.more-lines",
          null,
          h("summary", null, "Why this variant"),
          h(
            "ul",
            null,
            explanation.fit.map((line) => h("li", null, prose(line))),
          ),
        )
      : null,
  );
}

function models({ desired, report }) {
  const line = (label, model, note) =>
    h(
      "div.model-line",
      null,
      h("dt", null, label),
      h(
        "dd",
        null,
        model
          ? [
              h("a", { href: releasePath(model) }, releaseName(model)),
              " ",
              h("code.tag", null, model.variant),
              h("span.note", null, digest(model.manifest), note),
            ]
          : h("span.faint", null, "none"),
      ),
    );
  const same =
    desired.model && report?.running && desired.model.manifest === report.running.manifest;
  return section(
    "Models",
    { id: "models" },
    h(
      "dl.model-lines",
      null,
      line("Desired", desired.model, desired.model && ` ${bytes(desired.model.size_bytes)}`),
      line("Running", report?.running, same ? " as desired" : null),
      line("Previous", report?.previous, report?.previous ? " kept for going back" : null),
    ),
    !same &&
      desired.model &&
      report?.running &&
      !sameRelease(desired.model, report.running) &&
      h("p.hint", null, "What answers is not yet what is desired."),
  );
}

function configuration(desired, report) {
  const effective = report?.effective;
  const differing = new Set(differences(desired.runtime, effective));
  const names = Object.keys(desired.runtime);
  const write = (value) =>
    value === undefined
      ? "–"
      : value === true
        ? "on"
        : value === false
          ? "off"
          : typeof value === "number"
            ? count(value)
            : String(value);
  return section(
    "Configuration",
    {
      id: "configuration",
      hint: effective
        ? differing.size
          ? undefined
          : "read back from the engine: honoured exactly"
        : "not read back yet",
      aside:
        effective &&
        (differing.size
          ? chip("failed", plural(differing.size, "difference"))
          : chip("confirmed", "as asked")),
    },
    table({
      caption: "Configuration asked and in effect",
      columns: [
        { title: "Setting", head: true },
        { title: "Asked", align: "end" },
        { title: "In effect", align: "end" },
      ],
      rows: names.map((name) => ({
        key: name,
        tone: differing.has(name) ? "bad" : null,
        cells: [
          h("code", null, name),
          name === "threads" && desired.runtime[name] === 0
            ? "all cores"
            : write(desired.runtime[name]),
          [differing.has(name) && mark("cross"), effective ? write(effective[name]) : "–"],
        ],
      })),
    }),
    effective && h("p.hint", null, effective.engine),
  );
}

function about(device) {
  const { facts: known } = device;
  const labels = Object.entries(device.labels).filter(
    ([name]) => !["id", "name", "class", "site"].includes(name),
  );
  return section(
    "Facts",
    { id: "facts" },
    facts([
      ["Id", h("code", null, device.id)],
      ["Host", known.hostname],
      ["Processor", known.cpu, `${plural(known.cores, "core")}, ${known.arch}`],
      known.cpu_features.length > 0 && [
        "Extensions",
        h(
          "span.tags",
          null,
          known.cpu_features.map((name) => h("code.tag", null, name)),
        ),
      ],
      ["Kernel", known.kernel],
      ["Agent", known.agent_version],
      ["Engine", known.engine],
      known.endpoint && ["Endpoint", h("code", null, known.endpoint)],
      labels.length > 0 && [
        "Labels",
        h(
          "span.tags",
          null,
          labels.map(([name, value]) => h("code.tag", null, `${name}=${value}`)),
        ),
      ],
      ["Joined", clock(device.enrolled_at)],
      ["Reports", device.report ? count(device.report.sequence) : "none yet"],
      ["Time to confirm", seconds(device.desired.confirm_timeout_s)],
    ]),
  );
}

function explained(device, explanation) {
  if (!explanation?.values?.length) return null;
  return section(
    "Blueprint",
    { id: "blueprint", hint: "every effective value and the layer it came from" },
    table({
      caption: "Effective values by layer",
      columns: [
        { title: "Key", head: true },
        { title: "Value" },
        { title: "From" },
        { title: "Overrides" },
      ],
      rows: explanation.values.map((value) => ({
        key: value.key,
        cells: [
          h("code", null, value.key),
          h("code", null, value.value),
          h("span", { class: value.layer === "default" ? "faint" : "" }, value.layer),
          [
            value.overrides.length ? h("span.faint", null, value.overrides.join("; ")) : "",
            value.refused?.length
              ? h("span", { "data-tone": "warn" }, ` not overridable: ${value.refused.join("; ")}`)
              : "",
          ],
        ],
      })),
    }),
    h("p.hint", null, h("code", null, `slm blueprint explain ${device.name}`)),
  );
}

function rejected(report, releases) {
  if (!report?.rejected?.length) return null;
  const manifests = byManifest(releases);
  return section(
    "Rejected here",
    { id: "rejected", hint: "a manifest that failed here is not tried again" },
    table({
      caption: "Rejected manifests",
      stack: true,
      columns: [
        { title: "Release", head: true },
        { title: "Manifest" },
        { title: "Generation", align: "end" },
        { title: "Why" },
      ],
      rows: report.rejected.map((entry) => {
        const known = manifests.get(entry.manifest);
        return {
          key: entry.manifest,
          cells: [
            known
              ? [
                  h("a", { href: releasePath(known.release) }, releaseName(known.release)),
                  " ",
                  h("code.tag", null, known.variant.name),
                ]
              : h("span.faint", null, "unknown"),
            digest(entry.manifest),
            count(entry.generation),
            failureWords(entry.failure, bytes),
          ],
        };
      }),
    }),
  );
}

function past(history, device) {
  const newestFirst = [...history].sort((a, b) => Date.parse(b.at) - Date.parse(a.at));
  return section(
    "History",
    { id: "history" },
    newestFirst.length
      ? h(
          "ol.timeline",
          { reversed: true },
          newestFirst.map((event) =>
            h(
              "li",
              {
                "data-key": `${event.at} ${event.what}`,
                "data-tone": /fail|back|reject/.test(event.what)
                  ? "bad"
                  : /confirm/.test(event.what)
                    ? "good"
                    : "mute",
              },
              h(
                "p.timeline-what",
                null,
                event.what,
                h("span.faint", null, `generation ${count(event.generation)}`),
                when(event.at),
              ),
            ),
          ),
        )
      : empty(
          "Nothing yet",
          `The history of ${device.name} starts with its first report.`,
          `slm device show ${device.name}`,
        ),
  );
}
