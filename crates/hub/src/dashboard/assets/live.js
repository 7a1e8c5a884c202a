// Follows the hub's change notices. `EventSource` cannot send a bearer token, so the stream is
// read through `fetch`. A lost stream is opened again, with growing pauses.

import { bearer } from "./api.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;
/** The hub sends a comment now and then; a stream silent for longer than this is dead. */
const SILENCE_MS = 60_000;
const MAX_LINE_CHARS = 1 << 20;

/**
 * Calls `onChange({ kind, id })` for each notice and `onState("connecting" | "live" |
 * "reconnecting", retryAt)` as the stream comes and goes. Returns a function that ends it.
 */
export function follow(onChange, onState) {
  const end = new AbortController();
  run(end.signal, onChange, onState);
  return () => end.abort();
}

async function run(ended, onChange, onState) {
  let pause = FIRST_PAUSE_MS;
  onState("connecting");
  while (!ended.aborted) {
    try {
      await read(ended, onChange, () => {
        pause = FIRST_PAUSE_MS;
        onState("live");
        // Whatever was missed while nobody listened.
        onChange({ kind: "*" });
      });
    } catch {
      // Fall through: every ending is answered by opening it again.
    }
    if (ended.aborted) return;
    const wait = pause * (0.75 + Math.random() / 2);
    onState("reconnecting", Date.now() + wait);
    await sleep(wait, ended);
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
}

async function read(ended, onChange, onOpen) {
  const stop = new AbortController();
  const abort = () => stop.abort();
  ended.addEventListener("abort", abort, { once: true });
  let silence = setTimeout(abort, SILENCE_MS);
  try {
    const response = await fetch("/v1/events", {
      headers: { accept: "text/event-stream", authorization: `Bearer ${bearer()}` },
      signal: stop.signal,
      cache: "no-store",
      credentials: "omit",
    });
    if (!response.ok || !response.body) throw new Error(`events: ${response.status}`);
    onOpen();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let name = "";
    let data = [];
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(silence);
      silence = setTimeout(abort, SILENCE_MS);
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      if (rest.length > MAX_LINE_CHARS) throw new Error("events: a line without end");
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line === "") {
          notice(name, data.join("\n"), onChange);
          name = "";
          data = [];
        }
      }
    }
  } finally {
    clearTimeout(silence);
    ended.removeEventListener("abort", abort);
    stop.abort();
  }
}

/** `changed` names what changed; `reload` says that notices were missed; the rest is none of ours. */
function notice(name, text, onChange) {
  if (name === "reload") onChange({ kind: "*" });
  if (name !== "changed") return;
  try {
    onChange(JSON.parse(text));
  } catch {
    onChange({ kind: "*" });
  }
}

function sleep(milliseconds, ended) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    ended.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
