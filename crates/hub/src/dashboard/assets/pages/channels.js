// The channels: which release is on each, and how it came there.

import { get, page } from "../api.js";
import { h } from "../dom.js";
import { count, plural } from "../format.js";
import { releaseName, releasePath } from "../model.js";
import { chip, empty, mark, pageHead, section, table, when } from "../ui.js";
import { waveSize } from "./rollout.js";
import { progressWords } from "./rollouts.js";

const NEWEST_ROLLOUTS = 200;

export default {
  title: () => "Channels",
  kinds: ["channel", "rollout", "blueprint"],

  async load(_, signal) {
    const [channels, rollouts] = await Promise.all([
      get("/v1/channels", signal),
      page("/v1/rollouts", undefined, NEWEST_ROLLOUTS, signal),
    ]);
    const promotions = rollouts.items.filter((rollout) => rollout.promotion);
    return { channels: channels.items, promotions, complete: !rollouts.cursor };
  },

  view({ channels, promotions, complete }) {
    const head = pageHead({
      title: "Channels",
      lead: channels.length
        ? "The steps of a release on its way through the fleet."
        : "There are no channels: releases are rolled out by hand.",
      command: "slm channel list",
      json: "/v1/channels",
    });
    if (channels.length === 0) {
      return [
        head,
        empty(
          "Make the first channel",
          "A release is confirmed on one channel before it comes to the next. Devices follow a channel by their blueprint: channel = \"edge\".",
          "slm channel set edge",
          "slm channel set stable --after edge",
        ),
      ];
    }
    return [head, steps(channels), history(promotions, complete)];
  },
};

function steps(channels) {
  return section(
    "Channels",
    { id: "channels", hint: "in the order in which releases pass them" },
    table({
      caption: "Channels",
      stack: true,
      columns: [
        { title: "Channel", head: true },
        { title: "Followers", align: "end" },
        { title: "After" },
        { title: "Newest release" },
        { title: "Rolled out by" },
      ],
      rows: channels.map((channel) => ({
        key: channel.name,
        cells: [
          h("strong", null, channel.name),
          plural(channel.followers, "device"),
          channel.after ? h("span", null, channel.after) : h("span.faint", null, "the first"),
          channel.releases.length
            ? h(
                "ul.lines",
                null,
                channel.releases.map((release) =>
                  h(
                    "li",
                    { "data-key": releaseName(release) },
                    h("a", { href: releasePath(release) }, releaseName(release)),
                    " ",
                    h(
                      "a.plain",
                      { href: `/rollouts/${release.rollout}`, title: `rollout ${release.rollout}` },
                      chip(release.state),
                    ),
                  ),
                ),
              )
            : h("span.faint", null, "none yet"),
          h("span", null, `waves ${channel.policy.waves.map(waveSize).join(", then ")}`),
        ],
      })),
    }),
  );
}

function history(promotions, complete) {
  return section(
    "Promotions",
    { id: "promotions", hint: "newest first" },
    promotions.length
      ? table({
          caption: "Promotions",
          stack: true,
          columns: [
            { title: "Release", head: true },
            { title: "State" },
            { title: "To" },
            { title: "From" },
            { title: "Devices" },
            { title: "By" },
            { title: "When", align: "end" },
          ],
          rows: promotions.map((rollout) => ({
            key: rollout.id,
            cells: [
              h("a.strong", { href: `/rollouts/${rollout.id}` }, releaseName(rollout)),
              chip(rollout.state),
              rollout.promotion.channel,
              rollout.promotion.forced
                ? h(
                    "span",
                    { "data-tone": "warn", title: rollout.promotion.forced },
                    mark("bang"),
                    ` forced: ${rollout.promotion.forced}`,
                  )
                : (rollout.promotion.from ?? h("span.faint", null, "the first")),
              progressWords(rollout),
              rollout.created_by,
              when(rollout.created_at),
            ],
          })),
        })
      : empty(
          "Nothing was promoted yet",
          "The newest release goes to the first channel, and from there on.",
          "slm release promote smollm2@1.1.0 --to edge",
        ),
    !complete &&
      h("p.hint", null, `Those among the newest ${count(NEWEST_ROLLOUTS)} rollouts are shown.`),
  );
}
