// Talks to the hub's HTTP API with the viewer's token. The token lives in this tab's session
// storage only; it comes from the sign-in form or from `#token=` in the address.

const KEY = "slm-token";
const PAGE_LIMIT = 200;
const MAX_PAGES = 25;
const REQUEST_TIMEOUT_MS = 20_000;

let token = null;
try {
  token = sessionStorage.getItem(KEY);
} catch {
  // No storage: the token lives as long as the page.
}

/** A failed call: the hub's problem document (RFC 9457) where it sent one. */
export class Problem extends Error {
  constructor(status, title, detail, hint) {
    super(detail || title);
    Object.assign(this, { status, title, detail, hint });
  }
}

export const signedIn = () => token !== null;
export const bearer = () => token;

export function signIn(secret) {
  token = secret;
  knownIdentity = null;
  try {
    sessionStorage.setItem(KEY, secret);
  } catch {
    // As above.
  }
}

export function signOut() {
  token = null;
  knownIdentity = null;
  forgetReleases();
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // As above.
  }
}

/** Takes the token out of the address, so that it is in no history entry and no screenshot. */
export function takeTokenFromAddress() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const secret = fragment.get("token");
  if (!secret) return;
  signIn(secret);
  fragment.delete("token");
  const rest = fragment.toString();
  history.replaceState(null, "", location.pathname + location.search + (rest ? `#${rest}` : ""));
}

/** `GET path` as JSON. */
export const get = (path, signal) => call("GET", path, undefined, signal);
/** `POST path` with a JSON body, if any. */
export const post = (path, body) => call("POST", path, body);

async function call(method, path, body, signal) {
  const headers = { accept: "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const timeout = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, "the hub does not answer", `${method} ${path}`, "is `slm up` running?");
  }
  const text = await response.text();
  let answer = null;
  try {
    answer = text ? JSON.parse(text) : null;
  } catch {
    // Not JSON: an error page of something between us and the hub, shown as its status.
  }
  if (!response.ok) {
    throw new Problem(
      response.status,
      answer?.title ?? `the hub answered ${response.status}`,
      answer?.detail ?? `${method} ${path}`,
      answer?.hint,
    );
  }
  return answer;
}

/**
 * One page of a listing as `{ items, cursor }`, whether the hub pages it or not. `filter` holds more
 * parameters of the query.
 */
export async function page(path, cursor, limit = PAGE_LIMIT, signal, filter = {}) {
  const query = new URLSearchParams({ ...filter, limit: String(limit) });
  if (cursor) query.set("cursor", cursor);
  const answer = await get(`${path}?${query}`, signal);
  return Array.isArray(answer) ? { items: answer } : answer;
}

let knownIdentity = null;

/** Whose token this is: `{ name, role }`. */
export async function whoami(signal) {
  knownIdentity ??= await get("/v1/whoami", signal);
  return knownIdentity;
}

/** The same, if it was asked before. */
export const identity = () => knownIdentity;

let knownReleases = null;

/** All releases. They never change and carry long reports, so they are asked for once. */
export async function releases(signal) {
  knownReleases ??= await all("/v1/releases", signal);
  return knownReleases;
}

/** Asks for the releases anew the next time: one was added, or a notice was missed. */
export function forgetReleases() {
  knownReleases = null;
}

/** All of a listing, up to a bound; `complete` is false where the bound cut it. */
export async function all(path, signal) {
  const items = [];
  let cursor;
  for (let pages = 0; pages < MAX_PAGES; pages += 1) {
    const answer = await page(path, cursor, PAGE_LIMIT, signal);
    items.push(...(answer.items ?? []));
    cursor = answer.cursor;
    if (!cursor) return Object.assign(items, { complete: true });
  }
  return Object.assign(items, { complete: false });
}
