// Every release of every model line.

import { releases } from "../api.js";
import { h } from "../dom.js";
import { bytes, count, number, plural } from "../format.js";
import { releasePath, versions } from "../model.js";
import { chip, empty, pageHead, section, table, when } from "../ui.js";

export default {
  title: () => "Releases",
  kinds: ["release"],

  async load(_, signal) {
    return releases(signal);
  },

  view(known) {
    const head = pageHead({
      title: "Releases",
      lead: known.length
        ? "Each release names its variants, what was measured of them, and who signed."
        : "Nothing has been released yet.",
      command: "slm release list",
      json: "/v1/releases",
    });
    if (known.length === 0) {
      return [
        head,
        empty(
          "Ship the first model",
          "One command imports a model, makes a variant for each class, measures them against the original, signs, releases and rolls out.",
          "slm ship model.gguf --to all",
        ),
      ];
    }
    const lines = new Map();
    for (const release of known)
      lines.set(release.model, [...(lines.get(release.model) ?? []), release]);
    return [head, [...lines].sort().map(([model, versionsOf]) => line(model, versionsOf))];
  },
};

function line(model, known) {
  const newestFirst = [...known].sort((a, b) => versions(b.version, a.version));
  return section(
    model,
    { id: `line-${model}`, hint: plural(known.length, "release") },
    table({
      caption: `Releases of ${model}`,
      stack: true,
      columns: [
        { title: "Version", head: true },
        { title: "Gate" },
        { title: "Variants" },
        { title: "Sizes", align: "end" },
        { title: "KL divergence, best to worst", align: "end" },
        { title: "Released", align: "end" },
      ],
      rows: newestFirst.map((release) => {
        const sizes = release.variants.map((it) => it.size_bytes);
        const divergences = release.variants.map((it) => it.report.kl_divergence.mean);
        const span = (values, write) =>
          values.length > 1
            ? `${write(Math.min(...values))} – ${write(Math.max(...values))}`
            : write(values[0]);
        return {
          key: release.version,
          cells: [
            h("a.strong", { href: releasePath(release) }, release.version),
            gateOf(release),
            h(
              "span.tags",
              null,
              release.variants.map((it) => h("code.tag", null, it.quantisation)),
            ),
            sizes.length ? span(sizes, bytes) : count(0),
            divergences.length ? span(divergences, number) : "–",
            [when(release.created_at), h("span.note", null, release.created_by)],
          ],
        };
      }),
    }),
  );
}

/** The release's gate in one chip: the worst verdict of its variants, or that someone overrode it. */
export function gateOf(release) {
  if (release.gate_override) return chip("too_few_samples", "overridden");
  const verdicts = release.variants.map((it) => it.gate?.verdict).filter(Boolean);
  if (verdicts.length === 0) return h("span.faint", null, "no gate");
  return chip(["worse", "too_few_samples", "no_worse"].find((it) => verdicts.includes(it)));
}
