// Numbers, sizes, times and digests as people read them.

const MINUS = "−";
const THIN = " ";

/** `1 234`, with a thin space and a true minus. */
export function count(value) {
  if (!Number.isFinite(value)) return "–";
  const digits = Math.abs(Math.round(value))
    .toString()
    .replace(/\B(?=(\d{3})+$)/g, THIN);
  return (value < 0 ? MINUS : "") + digits;
}

/** Three significant digits, or as many as asked, never in exponent form for usual sizes. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e9) {
    const [mantissa, exponent] = value.toExponential(1).split("e");
    return `${mantissa.replace("-", MINUS)}·10${superscript(Number(exponent))}`;
  }
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  const text =
    size >= 10 ** digits ? Math.round(size).toString() : size.toFixed(Math.min(decimals, 8));
  const [whole, fraction] = text.split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, THIN);
  return (value < 0 ? MINUS : "") + (fraction ? `${grouped}.${fraction}` : grouped);
}

/** Always this many decimals, for columns that are compared. */
export function fixed(value, decimals) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return (value < 0 ? MINUS : "") + Math.abs(value).toFixed(decimals);
}

function superscript(value) {
  const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const text = [...Math.abs(value).toString()].map((digit) => digits[digit]).join("");
  return (value < 0 ? "⁻" : "") + text;
}

/** Decimal units, as disks and model pages state them: `138 MB`. */
export function bytes(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let size = value;
  while (size >= 999.5 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(size) : number(size)} ${units[unit]}`;
}

/** A share as `97.3 %`. */
export function percent(share, decimals = 1) {
  return Number.isFinite(share) ? `${fixed(share * 100, decimals)} %` : "–";
}

/** Milliseconds as `84 ms`, `1.2 s`. */
export function duration(milliseconds) {
  if (!Number.isFinite(milliseconds)) return "–";
  if (milliseconds < 1000)
    return `${milliseconds < 10 ? number(milliseconds, 2) : Math.round(milliseconds)} ms`;
  return seconds(milliseconds / 1000);
}

/** Seconds as `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`. */
export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 10) return `${number(value, 2)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  const parts = (large, small, a, b) => (small ? `${large} ${a} ${small} ${b}` : `${large} ${a}`);
  if (whole < 3600) return parts(Math.floor(whole / 60), whole % 60, "min", "s");
  const minutes = Math.round(whole / 60);
  if (minutes < 1440) return parts(Math.floor(minutes / 60), minutes % 60, "h", "min");
  const hours = Math.round(minutes / 60);
  return parts(Math.floor(hours / 24), hours % 24, "d", "h");
}

/** `just now`, `12 s ago`, `4 min ago`, `yesterday`-free and short. */
export function ago(instant, now = Date.now()) {
  const past = (now - Date.parse(instant)) / 1000;
  if (!Number.isFinite(past)) return "–";
  if (past < 0 && past > -5) return "just now";
  if (past < 0) return `in ${rough(-past)}`;
  return past < 3 ? "just now" : `${rough(past)} ago`;
}

function rough(value) {
  if (value < 60) return `${Math.floor(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86400) return `${Math.floor(value / 3600)} h`;
  return `${Math.floor(value / 86400)} d`;
}

/** Local date and time to the second. */
export function clock(instant) {
  const date = new Date(instant);
  if (Number.isNaN(date.getTime())) return "–";
  const two = (value) => String(value).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

/** The first digits of a digest. */
export function short(digest) {
  return digest ? digest.replace(/^sha256:/, "").slice(0, 12) : "–";
}

/** `1 device`, `2 devices`. */
export function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** `too_few_samples` as `too few samples`. */
export function words(name) {
  return String(name).replaceAll("_", " ");
}
