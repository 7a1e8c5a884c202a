// What the API's answers mean: one place that turns reports into states that people know.

/** A device not heard of for longer than this is shown as silent. */
export const SILENT_AFTER_S = 180;

/** The states: a tone (colour), a mark (shape) and a word, so that colour is never alone. */
export const STATES = {
  confirmed: { tone: "good", mark: "check", label: "confirmed" },
  updating: { tone: "busy", mark: "arrow", label: "updating" },
  failed: { tone: "bad", mark: "cross", label: "failed" },
  waiting: { tone: "warn", mark: "pause", label: "waiting" },
  silent: { tone: "mute", mark: "ring", label: "silent" },
  idle: { tone: "mute", mark: "ring", label: "no model" },
  joined: { tone: "mute", mark: "ring", label: "joined" },
  revoked: { tone: "mute", mark: "cross", label: "revoked" },
  pending: { tone: "mute", mark: "ring", label: "pending" },
  no_fit: { tone: "warn", mark: "bang", label: "no fit" },
  quarantined: { tone: "warn", mark: "bang", label: "quarantined" },
  away: { tone: "mute", mark: "ring", label: "away" },
  recalled: { tone: "mute", mark: "back", label: "recalled" },
  running: { tone: "busy", mark: "arrow", label: "running" },
  paused: { tone: "warn", mark: "pause", label: "paused" },
  halted: { tone: "bad", mark: "bang", label: "halted" },
  completed: { tone: "good", mark: "check", label: "completed" },
  aborted: { tone: "mute", mark: "cross", label: "aborted" },
  rolled_back: { tone: "warn", mark: "back", label: "rolled back" },
  no_worse: { tone: "good", mark: "check", label: "no worse" },
  worse: { tone: "bad", mark: "cross", label: "worse" },
  too_few_samples: { tone: "warn", mark: "bang", label: "too few samples" },
};

/** The steps between a new desired state and its confirmation, in order. */
export const STEPS = ["told", "downloaded", "verified", "staged", "activated", "confirmed"];

const REACHED = {
  downloading: 0,
  downloaded: 1,
  verified: 2,
  prestaged: 2,
  staged: 3,
  activated: 4,
  confirmed: 5,
};

/** The step that a failure is the end of: what came before it went well. */
const FAILED_AT = {
  signature: 2,
  digest: 2,
  package: 2,
  load: 3,
  crash: 3,
  configuration: 3,
  memory: 3,
  probes: 4,
};

/** How far a device is: `{ step, done, total, failed, waiting }`; `step` indexes {@link STEPS}. */
export function progress(device) {
  const report = device.report;
  if (!device.desired.model || !report) return { step: -1 };
  if (report.generation < device.desired.generation) return { step: -1, told: true };
  if (report.phase === "rolled_back") {
    const failedAt = FAILED_AT[report.failure.failure] ?? 5;
    return { step: failedAt - 1, failed: true, failedAt };
  }
  const still =
    report.phase === "idle" && report.running?.manifest === device.desired.model.manifest;
  return {
    step: still ? REACHED.confirmed : (REACHED[report.phase] ?? -1),
    downloading: report.phase === "downloading",
    done: report.done_bytes,
    total: report.total_bytes,
    waiting: isWaiting(report),
  };
}

/** Whether something is in the device's way, or a rule holds it up. */
export const isWaiting = (report) => report.phase === "waiting" || report.phase === "prestaged";

/** The device's one state, a key of {@link STATES}. */
export function deviceState(device, now = Date.now()) {
  if (device.revoked) return "revoked";
  if (now - Date.parse(device.last_seen) > SILENT_AFTER_S * 1000) return "silent";
  const report = device.report;
  if (!report) return "joined";
  if (report.phase === "rolled_back") return "failed";
  if (isWaiting(report)) return "waiting";
  if (device.desired.generation > report.generation && device.desired.model) return "updating";
  if (report.phase === "confirmed") return "confirmed";
  if (report.phase === "idle") {
    if (!device.desired.model) return "idle";
    return report.running?.manifest === device.desired.model.manifest ? "confirmed" : "updating";
  }
  return "updating";
}

/** `smollm2 1.0.0`, the name of a release wherever it is shown. */
export const releaseName = (model) => `${model.model} ${model.version}`;
/** The address of a release's page. */
export const releasePath = (model) =>
  `/releases/${encodeURIComponent(model.model)}/${encodeURIComponent(model.version)}`;

/** Whether two installed or desired models are the same release. */
export const sameRelease = (a, b) => a && b && a.model === b.model && a.version === b.version;

/** Finds the release and variant behind a manifest digest: `Map digest → { release, variant }`. */
export function byManifest(releases) {
  const found = new Map();
  for (const release of releases) {
    for (const variant of release.variants) found.set(variant.manifest, { release, variant });
  }
  return found;
}

/** The most releases that nothing runs among the columns of {@link matrix}. */
const MAX_UNUSED = 6;

/**
 * The hub's summary as class × release: `{ columns, rows }`. A device counts as confirmed under the
 * release that answers on it, as updating under the one it is going to, and as failed under each
 * release that it refuses.
 */
export function matrix(summary, releases, classes) {
  const columns = new Map();
  const column = (model) => {
    const name = releaseName(model);
    if (!columns.has(name)) columns.set(name, { name, model: model.model, version: model.version });
    return name;
  };
  const rows = new Map(
    classes.map((it) => [it.name, { ...it, total: 0, without: 0, cells: new Map() }]),
  );
  for (const { class: name, devices, without, releases: tallies } of summary.classes) {
    const cells = new Map(
      tallies.map((it) => [
        column(it),
        { confirmed: it.running, updating: it.updating, failed: it.failed },
      ]),
    );
    rows.set(name, { name, ...rows.get(name), total: devices, without, cells });
  }
  const unused = releases.filter((it) => !columns.has(releaseName(it)));
  for (const release of unused.slice(0, MAX_UNUSED)) column(release);
  const order = (a, b) => a.model.localeCompare(b.model) || versions(b.version, a.version);
  const bySize = (a, b) => (b.min_memory_bytes ?? 0) - (a.min_memory_bytes ?? 0);
  return { columns: [...columns.values()].sort(order), rows: [...rows.values()].sort(bySize) };
}

/** Orders semantic versions (their precedence, semver 2.0 section 11, near enough to list them). */
export function versions(a, b) {
  const parts = (version) => version.split("+")[0].split("-")[0].split(".").map(Number);
  const [left, right] = [parts(a), parts(b)];
  for (let at = 0; at < 3; at += 1) {
    if (left[at] !== right[at]) return left[at] - right[at];
  }
  const bare = (version) => (version.includes("-") ? 0 : 1);
  return bare(a) - bare(b) || a.localeCompare(b);
}

/** A failure in words with its numbers: `{ title, lines }`; its probes are drawn apart. */
export function failureWords(failure, bytes) {
  switch (failure?.failure) {
    case "probes": {
      const failing = failure.results.filter((result) => !result.passed);
      const names = failing.map((result) => result.name).join(", ");
      return `${failing.length} of ${failure.results.length} probes failed: ${names}`;
    }
    case "load":
      return "the engine could not load the file";
    case "crash":
      return "the worker died while loading, probing or in its first minutes";
    case "signature":
      return "the signature is missing, wrong, or by a key this device does not trust";
    case "digest":
      return "the manifest or a blob is not what its digest says";
    case "package":
      return "the manifest is not a package this agent understands";
    case "configuration":
      return `the engine does not run what was asked: ${failure.settings.join(", ")}`;
    case "memory":
      return `measured ${bytes(failure.measured_bytes)}, the budget is ${bytes(failure.budget_bytes)}`;
    case "timeout":
      return "not confirmed in time";
    default:
      return failure ? String(failure.failure) : "";
  }
}

/** The settings that the engine runs otherwise than asked, as names. */
export function differences(asked, effective) {
  if (!effective) return [];
  return Object.keys(asked).filter(
    (name) => !(name === "threads" && asked.threads === 0) && asked[name] !== effective[name],
  );
}

/** Groups a rollout's devices by wave: an array of arrays. */
export function waves(rollout) {
  const found = Array.from({ length: rollout.waves }, () => []);
  for (const device of rollout.devices) (found[device.wave] ??= []).push(device);
  return found;
}

/** How many of all devices of a rollout are in each outcome. */
export function rolloutCounts(rollout) {
  const total = {};
  for (const wave of rollout.counts)
    for (const [outcome, devices] of Object.entries(wave))
      total[outcome] = (total[outcome] ?? 0) + devices;
  return total;
}

/** All devices of counts by outcome. */
export const sumOf = (counts) => Object.values(counts).reduce((sum, devices) => sum + devices, 0);
