// Every rollout, newest first.

import { page } from "../api.js";
import { h } from "../dom.js";
import { plural, seconds } from "../format.js";
import { releaseName, rolloutCounts, sumOf } from "../model.js";
import { bar, chip, empty, pageHead, section, table, when } from "../ui.js";

const SHOWN_ROLLOUTS = 100;

export default {
  title: () => "Rollouts",
  kinds: ["rollout"],

  async load(_, signal) {
    return page("/v1/rollouts", undefined, SHOWN_ROLLOUTS, signal);
  },

  view({ items: rollouts, cursor }) {
    const head = pageHead({
      title: "Rollouts",
      lead: rollouts.length
        ? "Waves of devices, each held to its own evidence."
        : "Nothing has been rolled out yet.",
      command: "slm rollout list",
      json: "/v1/rollouts",
    });
    if (rollouts.length === 0) {
      return [
        head,
        empty(
          "Start the first rollout",
          "A release goes out in waves; a wave that fails stops it.",
          "slm rollout start smollm2 1.0.0 --to all",
        ),
      ];
    }
    const newestFirst = [...rollouts].sort(
      (a, b) => Date.parse(b.created_at) - Date.parse(a.created_at),
    );
    return [
      head,
      section(
        "All rollouts",
        { id: "rollouts" },
        table({
          caption: "Rollouts",
          stack: true,
          columns: [
            { title: "Release", head: true },
            { title: "State" },
            { title: "Devices" },
            { title: "Wave", align: "end" },
            { title: "For" },
            { title: "Started", align: "end" },
            { title: "Took", align: "end" },
          ],
          rows: newestFirst.map((rollout) => ({
            key: rollout.id,
            cells: [
              [
                h(
                  "a.strong",
                  { href: `/rollouts/${encodeURIComponent(rollout.id)}` },
                  releaseName(rollout),
                ),
                h("span.note", null, rollout.id),
              ],
              chip(rollout.state),
              h(
                "div.meter-cell",
                null,
                progressWords(rollout),
                progressBar(rollout),
              ),
              `${Math.min(rollout.current_wave + 1, rollout.waves)} of ${rollout.waves}`,
              h("code", null, rollout.policy.selector),
              [when(rollout.created_at), h("span.note", null, rollout.created_by)],
              seconds((Date.parse(rollout.updated_at) - Date.parse(rollout.created_at)) / 1000),
            ],
          })),
        }),
        cursor &&
          h("p.hint", null, `The newest ${SHOWN_ROLLOUTS} are shown; the command line lists all.`),
      ),
    ];
  },
};

const PARTS = [
  ["confirmed", "good"],
  ["updating", "busy"],
  ["failed", "bad"],
  ["no_fit", "warn"],
  ["quarantined", "warn"],
  ["away", "mute"],
  ["recalled", "mute"],
];

/** The devices' outcomes as one bar. */
export function progressBar(rollout) {
  const found = rolloutCounts(rollout);
  const parts = PARTS.map(([name, tone]) => ({
    tone,
    value: found[name] ?? 0,
    label: name.replace("_", " "),
  }));
  return bar(parts, sumOf(found), "progress");
}

/** The devices' outcomes as words: `2 of 3 confirmed, 1 failed`. */
export function progressWords(rollout) {
  const found = rolloutCounts(rollout);
  const others = PARTS.slice(1)
    .filter(([name]) => found[name])
    .map(([name]) => `, ${found[name]} ${name.replace("_", " ")}`);
  return h(
    "span",
    null,
    `${found.confirmed ?? 0} of ${plural(sumOf(found), "device")} confirmed`,
    others,
  );
}
