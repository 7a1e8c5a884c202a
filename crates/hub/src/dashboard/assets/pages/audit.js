// Who did what, in a chain that shows when it was tampered with.

import { get, page } from "../api.js";
import { h } from "../dom.js";
import { clock, count, plural, short } from "../format.js";
import {
  announce,
  chip,
  digest,
  empty,
  facts,
  mark,
  pageHead,
  section,
  toast,
  when,
} from "../ui.js";

const ENTRIES = 50;

export default {
  title: () => "Audit",
  kinds: [
    "audit",
    "rollout",
    "release",
    "device",
    "token",
    "blueprint",
    "key",
    "class",
    "invitation",
  ],

  async load(_, signal, state) {
    const [first, verdict] = await Promise.all([
      page("/v1/audit", undefined, ENTRIES, signal),
      get("/v1/audit/verify", signal),
    ]);
    const newestKnown = Math.max(0, ...(state.entries ?? new Map()).keys());
    const oldestNew = Math.min(...first.items.map((entry) => entry.sequence));
    if (!state.entries || oldestNew > newestKnown + 1) {
      // The first look, or more has happened since than one page holds: start over, without gaps.
      state.entries = new Map();
      state.cursor = first.cursor;
    }
    // New entries push old ones off the first page: what was shown stays.
    for (const entry of first.items) state.entries.set(entry.sequence, entry);
    return verdict;
  },

  view(verdict, { state, redraw }) {
    const entries = [...state.entries.values()].sort((a, b) => b.sequence - a.sequence);
    const oldest = entries.at(-1)?.sequence ?? 1;
    const more = state.cursor && oldest > 1;
    const loadMore = async () => {
      state.busy = true;
      redraw();
      try {
        const answer = await page("/v1/audit", state.cursor, ENTRIES);
        for (const entry of answer.items) state.entries.set(entry.sequence, entry);
        state.cursor = answer.cursor;
        announce(`${answer.items.length} more entries`);
      } catch (problem) {
        toast(`${problem.title}: ${problem.detail ?? ""}`, "bad");
      } finally {
        state.busy = false;
        redraw();
      }
    };
    return [
      pageHead({
        title: "Audit",
        chips: verdict.broken ? chip("failed", "chain broken") : chip("confirmed", "chain holds"),
        lead: "Every change, who made it, and the hash that ties it to the one before.",
        command: "slm audit verify",
        json: "/v1/audit",
      }),
      verdict.broken &&
        h(
          "div.notice",
          { role: "alert", "data-tone": "bad" },
          mark("bang"),
          h(
            "div",
            null,
            h("p.notice-title", null, "The log has been changed"),
            h("p", null, verdict.broken),
          ),
        ),
      h(
        "p.chain",
        { "data-key": "chain" },
        `${plural(verdict.entries, "entry", "entries")} hold, `,
        verdict.from ? `${count(verdict.entries - verdict.from)} of them checked now, ` : "",
        verdict.cursor ? "more to check, newest checked hash " : "newest hash ",
        digest(verdict.head),
      ),
      entries.length
        ? section(
            "Entries",
            { id: "entries", hint: "newest first" },
            h("ol.log", { reversed: true }, entries.map(line)),
            more &&
              h(
                "div.more",
                null,
                h(
                  "button",
                  { type: "button", disabled: state.busy, on: { click: loadMore } },
                  state.busy ? "Loading …" : `Older entries (${count(oldest - 1)} more)`,
                ),
              ),
          )
        : empty(
            "Nothing has happened yet",
            "The first act that changes something will be the first entry.",
            "slm token create dashboard --role viewer",
          ),
    ];
  },
};

function line(entry) {
  const details =
    entry.details && Object.keys(entry.details).length
      ? JSON.stringify(entry.details, null, 2)
      : null;
  return h(
    "li",
    { "data-key": entry.sequence },
    h(
      "details",
      null,
      h(
        "summary",
        null,
        h("span.sequence", null, count(entry.sequence)),
        h("code.action", null, entry.action),
        h("span.object", { title: entry.object }, entry.object),
        h("span.actor", null, entry.actor),
        when(entry.at),
      ),
      h(
        "div.log-body",
        null,
        facts([
          ["When", clock(entry.at)],
          ["Hash", digest(entry.hash)],
          [
            "After",
            /^sha256:0+$/.test(entry.previous)
              ? h("span.faint", null, "nothing: the first")
              : digest(entry.previous),
            null,
          ],
        ]),
        details &&
          h(
            "pre.json",
            {
              tabindex: "0",
              "aria-label": `Details of entry ${entry.sequence}, ${short(entry.hash)}`,
            },
            details,
          ),
      ),
    ),
  );
}
