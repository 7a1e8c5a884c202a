// The webhooks: who is told, what waits, and what was given up.

import { get, page, post } from "../api.js";
import { h } from "../dom.js";
import { count, plural, seconds } from "../format.js";
import {
  announce,
  chip,
  commandLine,
  confirmed,
  empty,
  facts,
  mark,
  pageHead,
  section,
  table,
  toast,
  when,
} from "../ui.js";

const SHOWN_DELIVERIES = 20;

export default {
  title: () => "Webhooks",
  kinds: ["webhook"],
  // Deliveries are not announced.
  pollMs: 5000,

  async load(_, signal) {
    let webhooks;
    try {
      webhooks = (await get("/v1/webhooks", signal)).items;
    } catch (problem) {
      if (problem.status !== 403) throw problem;
      return { refused: true, webhooks: [] };
    }
    const deliveries = (id, filter) =>
      page(`/v1/webhooks/${id}/deliveries`, undefined, SHOWN_DELIVERIES, signal, filter);
    return {
      webhooks: await Promise.all(
        webhooks.map(async (webhook) => {
          const [dead, newest] = await Promise.all([
            webhook.dead ? deliveries(webhook.id, { state: "dead" }) : { items: [] },
            deliveries(webhook.id, {}),
          ]);
          return { ...webhook, letters: dead.items, newest: newest.items };
        }),
      ),
    };
  },

  view({ webhooks, refused }, { reload }) {
    const dead = webhooks.reduce((sum, it) => sum + it.dead, 0);
    const head = pageHead({
      title: "Webhooks",
      chips: dead > 0 && chip("failed", `${count(dead)} given up`),
      lead: "Other programs that are told what the audit log says, entry by entry.",
      command: "slm webhook list",
      json: "/v1/webhooks",
    });
    if (refused) {
      return [
        head,
        h(
          "div.notice",
          { "data-tone": "warn" },
          mark("bang"),
          h("p", null, "Webhooks are for operators: sign in with an operator's token."),
        ),
      ];
    }
    if (webhooks.length === 0) {
      return [
        head,
        empty(
          "Tell another program",
          "Each event is a signed CloudEvent, tried again until it is taken.",
          "slm webhook add https://…/slm --events 'rollout.*,device.*'",
        ),
      ];
    }
    return [head, webhooks.map((webhook) => one(webhook, reload))];
  },
};

/** Its path and query may be secrets of the receiver's. */
const hostOf = (url) => {
  try {
    return new URL(url).host;
  } catch {
    return url;
  }
};

function one(webhook, reload) {
  const { id, events, retry, letters, newest } = webhook;
  return section(
    hostOf(webhook.url),
    { id: `webhook-${id}`, hint: id },
    h(
      "div.split",
      null,
      facts([
        ["Events", h("code", null, events.join(", "))],
        ["Waiting", count(webhook.pending)],
        [
          "Given up",
          webhook.dead ? chip("failed", plural(webhook.dead, "event")) : "none",
        ],
        ["Up to entry", count(webhook.cursor)],
        [
          "Tried",
          `${plural(retry.attempts, "time")}, after ${seconds(retry.first_delay_ms / 1000)} up to ${seconds(retry.max_delay_ms / 1000)}`,
        ],
        ["Added", when(webhook.created_at), `by ${webhook.created_by}`],
        Date.parse(webhook.previous_secret_until) > Date.now() && [
          "Old secret",
          ["signs as well until ", when(webhook.previous_secret_until)],
        ],
      ]),
      h(
        "div",
        null,
        h("p.sub", null, "Newest events"),
        newest.length
          ? h(
              "ul.lines",
              null,
              newest.slice(0, 6).map((it) =>
                h(
                  "li",
                  { "data-key": it.sequence },
                  h("code", null, it.action),
                  " ",
                  state(it),
                ),
              ),
            )
          : h("p.faint", null, "None was wanted yet."),
      ),
    ),
    letters.length > 0 && dead(webhook, letters, reload),
    h(
      "div.as-command",
      null,
      commandLine(`slm webhook deliveries ${id}${webhook.dead ? " --state dead" : ""}`),
    ),
  );
}

const STATES = { pending: "updating", delivered: "confirmed", dead: "failed" };
const WORDS = { pending: "waits", delivered: "taken", dead: "given up" };
const state = (delivery) =>
  chip(STATES[delivery.state], `${WORDS[delivery.state]}${delivery.last ? `: ${delivery.last}` : ""}`);

function dead(webhook, letters, reload) {
  const again = async (sequence) => {
    const what = sequence ? `entry ${sequence}` : `all ${webhook.dead} given up`;
    const sure = await confirmed({
      title: `Deliver ${what} again?`,
      text: `${hostOf(webhook.url)} is told as often as of new events.`,
      command: `slm webhook redeliver ${webhook.id}${sequence ? ` --sequence ${sequence}` : ""}`,
      verb: "Deliver",
    });
    if (!sure) return;
    try {
      const body = sequence ? { sequence } : {};
      const { deliveries } = await post(`/v1/webhooks/${webhook.id}/redeliver`, body);
      toast(`${plural(deliveries, "event")} on the way again`);
      announce(`${plural(deliveries, "event")} on the way again`);
    } catch (problem) {
      toast(`${problem.title}: ${problem.detail ?? ""}`, "bad");
    }
    reload();
  };
  return [
    h(
      "div.sub-head",
      null,
      h("p.sub", null, "Dead letters"),
      h("button", { type: "button", "data-key": "all", on: { click: () => again() } }, "Deliver all"),
    ),
    table({
      caption: `Dead letters of ${hostOf(webhook.url)}`,
      stack: true,
      columns: [
        { title: "Event", head: true },
        { title: "Entry", align: "end" },
        { title: "Attempts", align: "end" },
        { title: "Last answer" },
        { title: "", align: "end" },
      ],
      rows: letters.map((it) => ({
        key: it.sequence,
        cells: [
          h("code", null, it.action),
          count(it.sequence),
          count(it.attempts),
          it.last,
          h(
            "button.quiet",
            {
              type: "button",
              "aria-label": `Deliver entry ${it.sequence} again`,
              on: { click: () => again(it.sequence) },
            },
            "Again",
          ),
        ],
      })),
    }),
  ];
}
