// One release: its variants, what was measured, what the gate said.

import { get } from "../api.js";
import { lossAgainstAllowed, qualityOverSize, timeline } from "../chart.js";
import { h } from "../dom.js";
import { bytes, count, duration, fixed, number, percent, plural, words } from "../format.js";
import { STATES, releasePath } from "../model.js";
import {
  chip,
  commandLine,
  digest,
  facts,
  mark,
  pageHead,
  section,
  showJson,
  table,
  when,
} from "../ui.js";
import { gateOf } from "./releases.js";

const path = ({ model, version }) => `/v1${releasePath({ model, version })}`;

export default {
  title: ({ model, version }) => `${model} ${version}`,
  kinds: ["release"],

  async load(parameters, signal, state) {
    const [release, inUse] = await Promise.all([
      get(path(parameters), signal),
      get(telemetryPath(parameters, state), signal),
    ]);
    return { release, inUse: inUse.items };
  },

  view({ release, inUse }, { parameters, state, reload }) {
    const variants = [...release.variants].sort((a, b) => b.size_bytes - a.size_bytes);
    return [
      pageHead({
        over: h("a", { href: "/releases" }, "Releases"),
        title: `${release.model} ${release.version}`,
        chips: gateOf(release),
        lead: [
          plural(variants.length, "variant"),
          ", released ",
          when(release.created_at),
          ` by ${release.created_by}`,
        ],
        command: `slm release show ${release.model} ${release.version}`,
        json: path(parameters),
      }),
      release.gate_override &&
        h(
          "div.notice",
          { "data-tone": "warn" },
          mark("bang"),
          h(
            "div",
            null,
            h("p.notice-title", null, "Released in spite of its gate"),
            h("p", null, `“${release.gate_override.reason}”`),
            h("p.hint", null, `by ${release.created_by}; the audit log holds this decision`),
          ),
        ),
      h("div.split", { "data-key": "split" }, chartBlock(variants), origin(release, variants)),
      use(inUse, { parameters, state, reload }),
      measured(variants),
      tasks(variants),
      gates(variants),
    ];
  },
};

const SPANS = {
  hour: { label: "48 hours", ms: 48 * 3_600_000 },
  day: { label: "60 days", ms: 60 * 86_400_000 },
};

const telemetryPath = ({ model }, { span = "hour" }) =>
  `/v1/telemetry?${new URLSearchParams({ model, span })}`;

/** What devices count of it, beside the version of the same line that they used most. */
function use(inUse, { parameters, state, reload }) {
  const span = state.span ?? "hour";
  const answered = (series) => series.points.reduce((sum, it) => sum + it.answered, 0);
  const own = inUse.find((it) => it.version === parameters.version);
  const other = inUse
    .filter((it) => it.version !== parameters.version)
    .sort((a, b) => answered(b) - answered(a))[0];
  const shown = [
    own && { name: own.version, points: own.points },
    other && { name: other.version, dashed: true, points: other.points },
  ].filter(Boolean);
  const to = Date.now();
  const from = to - SPANS[span].ms;
  const chart = (label, write, value, high) =>
    timeline(
      shown.map(({ name, dashed, points }) => ({
        name,
        dashed,
        points: points
          .map((it) => ({ at: Date.parse(it.start), value: value(it), high: high?.(it) }))
          .filter((it) => it.value !== undefined && it.at >= from),
      })),
      { label, write, from, to },
    );
  const choose = (name) => () => {
    state.span = name;
    reload();
  };
  const json = telemetryPath(parameters, state);
  const tools = h(
    "div.choices",
    { role: "group", "aria-label": "Time" },
    Object.entries(SPANS).map(([name, { label }]) =>
      h(
        "button.choice",
        {
          type: "button",
          "data-key": name,
          "data-tone": "busy",
          "aria-pressed": String(name === span),
          on: { click: choose(name) },
        },
        label,
      ),
    ),
    h(
      "button.quiet",
      { type: "button", title: `GET ${json}`, on: { click: () => showJson(json) } },
      "JSON",
    ),
  );
  const share = (it) => (it.answered + it.errors ? it.errors / (it.answered + it.errors) : undefined);
  return section(
    "In use",
    { id: "use", aside: tools, hint: "what the devices on which it runs have counted" },
    shown.length
      ? [
          h(
            "p.legend",
            null,
            shown.map(({ name, dashed, points }) =>
              h(
                "span.line-name",
                { "data-key": name },
                h(dashed ? "span.line-mark.dashed" : "span.line-mark", { "aria-hidden": "true" }),
                h("strong", null, name),
                h("span.faint", null, ` ${count(points.reduce((n, it) => n + it.answered, 0))} answers`),
              ),
            ),
          ),
          h(
            "div.charts",
            null,
            chart("tokens per second, median", number, (it) => it.tokens_per_s?.p50),
            chart(
              "time to first token, median and 95 %",
              duration,
              (it) => it.first_token_ms?.p50,
              (it) => it.first_token_ms?.p95,
            ),
            chart("requests that failed by our fault", (it) => percent(it, 2), share),
            chart(
              "peak memory, median and 95 %",
              bytes,
              (it) => it.memory_bytes?.p50,
              (it) => it.memory_bytes?.p95,
            ),
          ),
        ]
      : h("p.faint", null, `No device has counted anything of it in the last ${SPANS[span].label}.`),
    h(
      "div.as-command",
      null,
      commandLine(
        `slm fleet telemetry --running ${parameters.model}${span === "day" ? " --by-day" : ""}`,
      ),
    ),
  );
}

function chartBlock(variants) {
  const chart = qualityOverSize(variants);
  if (!chart)
    return section(
      "Quality over size",
      { id: "chart" },
      h("p.faint", null, "No variant diverges from the reference measurably."),
    );
  return section("Quality over size", { id: "chart" }, chart);
}

function origin(release, variants) {
  const report = variants[0]?.report;
  const shape = variants[0]?.shape;
  const adapter = variants[0]?.adapter;
  const where = [...new Set(variants.map((it) => it.report.machine.measured))]
    .map(words)
    .join(", ");
  return section(
    "Origin",
    { id: "origin" },
    facts([
      ["Signed by key", h("code", null, release.key)],
      ["Original", digest(release.original)],
      adapter && ["Adapter", digest(adapter.digest), `LoRA, ${bytes(adapter.size_bytes)}`],
      report && ["Suite", digest(report.suite)],
      shape && [
        "Model",
        `${shape.architecture}, ${count(shape.parameters / 1e6)} M parameters, ${shape.layers} layers`,
      ],
      shape && ["Trained context", `${count(shape.trained_context)} tokens`],
      report && [
        "Measured",
        h("span", null, h("strong", null, where), " hardware"),
        `${report.machine.cpu}, ${plural(report.machine.cores, "core")}, ${bytes(report.machine.memory_bytes)}, ${report.machine.arch}`,
      ],
      report && ["Engine", report.engine],
      report && ["Finished", when(report.finished_at)],
    ]),
  );
}

const interval = (estimate, write) =>
  h(
    "span.interval",
    { title: `95 % confidence interval over ${plural(estimate.samples, "sample")}` },
    write(estimate.mean),
    h("span.note", null, `${write(estimate.low)} – ${write(estimate.high)}`),
  );

function measured(variants) {
  return section(
    "Variants",
    {
      id: "variants",
      hint: "measured against the original; small figures are 95 % confidence intervals",
    },
    table({
      caption: "Variants and what was measured of them",
      sticky: true,
      columns: [
        { title: "Variant", head: true },
        { title: "Size", align: "end" },
        { title: "Perplexity", align: "end" },
        { title: "KL, nats/token", align: "end" },
        { title: "KL p99", align: "end" },
        { title: "Top-1 agreement", align: "end" },
        { title: "Decode, tok/s", align: "end" },
        { title: "Prompt, tok/s", align: "end" },
        {
          title: "First token",
          align: "end",
          help: "time to first token after a 128-token prompt",
        },
        { title: "Peak memory", align: "end" },
        { title: "Measured" },
        { title: "Manifest" },
      ],
      rows: variants.map(({ name, classes, quantisation, manifest, size_bytes: size, report }) => ({
        key: name,
        cells: [
          [
            h("strong", null, quantisation),
            h(
              "span.note",
              null,
              classes.length ? `for ${classes.join(", ")}` : "for no class by name",
            ),
          ],
          bytes(size),
          number(report.perplexity, 4),
          interval(report.kl_divergence, number),
          number(report.kl_p99),
          interval(report.top1_agreement, (share) => percent(share)),
          number(report.decode_tokens_per_s),
          number(report.prompt_tokens_per_s),
          duration(report.time_to_first_token_ms),
          bytes(report.peak_memory_bytes),
          h(
            "span",
            { title: `${report.machine.cpu}, ${report.machine.kernel}` },
            words(report.machine.measured),
          ),
          digest(manifest),
        ],
      })),
    }),
  );
}

function tasks(variants) {
  const names = [...new Set(variants.flatMap((it) => it.report.tasks.map((task) => task.name)))];
  if (names.length === 0) return null;
  return section(
    "Tasks",
    { id: "tasks", hint: "share of items right" },
    table({
      caption: "Task scores by variant",
      sticky: true,
      columns: [
        { title: "Task", head: true },
        { title: "Items", align: "end" },
        ...variants.map((it) => ({ title: it.quantisation, align: "end" })),
      ],
      rows: names.map((name) => {
        const of = (variant) => variant.report.tasks.find((task) => task.name === name);
        const first = variants.map(of).find(Boolean);
        return {
          key: name,
          cells: [
            words(name),
            count(first.accuracy.samples),
            ...variants.map((variant) => {
              const task = of(variant);
              return task ? interval(task.accuracy, (share) => percent(share, 0)) : "–";
            }),
          ],
        };
      }),
    }),
  );
}

function gates(variants) {
  const decided = variants.filter((variant) => variant.gate);
  if (decided.length === 0) {
    return section(
      "Gate",
      { id: "gate" },
      h(
        "p.faint",
        null,
        "This release carries no gate decision: there was nothing before it to be no worse than.",
      ),
    );
  }
  const shown = decided.findIndex((variant) => variant.gate.verdict !== "no_worse");
  return section(
    "Gate",
    {
      id: "gate",
      hint: "each metric on its own: the paired loss and its 95 % interval against what is allowed",
    },
    decided.map(({ name, quantisation, gate }, at) =>
      h(
        "details.gate",
        { "data-key": `gate-${name}`, open: at === shown },
        h(
          "summary",
          null,
          h("strong", null, quantisation),
          chip(gate.verdict),
          h(
            "span.note",
            null,
            gate.verdict === "no_worse"
              ? `all ${gate.rows.length} rows hold`
              : plural(
                  gate.rows.filter((row) => row.verdict !== "no_worse").length,
                  "row stands out",
                  "rows stand out",
                ),
          ),
        ),
        table({
          caption: `Gate rows of ${quantisation}`,
          sticky: true,
          columns: [
            { title: "Metric", head: true },
            { title: "Against" },
            { title: "Loss", align: "end" },
            { title: "95 % interval", align: "end" },
            { title: "Allowed", align: "end" },
            { title: "Loss, interval and limit" },
            { title: "Samples", align: "end" },
            { title: "Verdict" },
          ],
          rows: gate.rows.map((row) => ({
            key: `${row.metric} ${row.against}`,
            tone: row.verdict === "worse" ? "bad" : null,
            cells: [
              words(row.metric.replace(/^task:/, "task: ")),
              row.against,
              fixed(row.loss.mean, 4),
              `${fixed(row.loss.low, 4)} … ${fixed(row.loss.high, 4)}`,
              fixed(row.allowed, 4),
              h("span", { "data-tone": STATES[row.verdict].tone }, lossAgainstAllowed(row)),
              count(row.loss.samples),
              chip(row.verdict),
            ],
          })),
        }),
      ),
    ),
  );
}
