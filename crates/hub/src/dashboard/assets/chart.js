// Drawings: quality over size, and the little line of a number over time.

import { h, s } from "./dom.js";
import { bytes, clock, fixed, number } from "./format.js";

const WIDTH = 640;
const HEIGHT = 320;
const PAD = { left: 62, right: 40, top: 20, bottom: 46 };

/**
 * KL divergence (log axis) over size: down and to the left is better. Each point can be reached
 * by keyboard and says its numbers; the table beside it holds the same.
 */
export function qualityOverSize(variants) {
  const points = variants
    .map((variant) => ({ variant, x: variant.size_bytes / 1e6, kl: variant.report.kl_divergence }))
    .filter((point) => point.x > 0 && point.kl.mean > 0)
    .sort((a, b) => a.x - b.x);
  if (points.length === 0) return null;
  const largest = Math.max(...points.map((point) => point.x));
  const smallest = Math.min(...points.map((point) => point.x));
  const spread = Math.max(largest - smallest, largest * 0.2);
  const step = niceStep(spread / 5);
  const fromX = Math.max(0, Math.floor((smallest - spread * 0.14) / step) * step);
  const toX = Math.ceil((largest + spread * 0.14) / step) * step;
  const lows = points.map((point) => Math.max(point.kl.low, point.kl.mean / 4));
  const fromY = Math.log10(Math.min(...lows)) - 0.2;
  const toY = Math.max(
    fromY + 0.6,
    Math.log10(Math.max(...points.map((point) => point.kl.high))) + 0.2,
  );
  const x = (value) =>
    PAD.left + ((value - fromX) / (toX - fromX)) * (WIDTH - PAD.left - PAD.right);
  const y = (value) =>
    HEIGHT -
    PAD.bottom -
    ((Math.log10(Math.max(value, 10 ** fromY)) - fromY) / (toY - fromY)) *
      (HEIGHT - PAD.top - PAD.bottom);

  const grid = [];
  const named = toY - fromY > 3 ? [1] : toY - fromY > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let power = Math.floor(fromY); power <= toY; power += 1) {
    for (let digit = 1; digit < 10; digit += 1) {
      const value = digit * 10 ** power;
      if (Math.log10(value) < fromY || Math.log10(value) > toY) continue;
      const at = y(value);
      const line = named.includes(digit) ? "line.grid" : "line.grid.minor";
      grid.push(s(line, { x1: PAD.left, x2: WIDTH - PAD.right, y1: at, y2: at }));
      if (named.includes(digit)) {
        const text = power < -4 ? `${digit}e${power}` : String(Number(value.toFixed(6)));
        grid.push(s("text.tick", { x: PAD.left - 8, y: at + 4, "text-anchor": "end" }, text));
      }
    }
  }
  for (let value = fromX; value <= toX + step / 2; value += step) {
    grid.push(s("line.grid", { x1: x(value), x2: x(value), y1: PAD.top, y2: HEIGHT - PAD.bottom }));
    grid.push(
      s(
        "text.tick",
        { x: x(value), y: HEIGHT - PAD.bottom + 18, "text-anchor": "middle" },
        String(Number(value.toFixed(6))),
      ),
    );
  }
  const path = points
    .map((point, at) => `${at ? "L" : "M"}${x(point.x)} ${y(point.kl.mean)}`)
    .join("");
  const tips = [];
  const drawn = points.map((point, index) => {
    const { variant, kl } = point;
    const [cx, cy] = [x(point.x), y(kl.mean)];
    const text = `${variant.quantisation}: ${bytes(variant.size_bytes)}, KL ${number(kl.mean)} nats per token (95 % interval ${number(kl.low)} to ${number(kl.high)})`;
    // Beside the point, on the side where no neighbour stands.
    const next = points[index + 1];
    const left = next && x(next.x) - cx < 100;
    const beside = { x: left ? cx - 11 : cx + 11, "text-anchor": left ? "end" : "start" };
    const drop = left ? 15 : -8;
    const tip = [
      `KL ${number(kl.mean)}`,
      `95 % ${number(kl.low)} to ${number(kl.high)}`,
      `perplexity ${number(variant.report.perplexity, 4)}`,
      `top-1 ${fixed(variant.report.top1_agreement.mean * 100, 1)} %`,
    ];
    const below = cy < PAD.top + 90;
    const tipX = Math.min(Math.max(cx - 70, PAD.left), WIDTH - PAD.right - 150);
    const tipY = below ? cy + 16 : cy - 92;
    tips.push(
      s(
        "g.tip",
        { "aria-hidden": "true" },
        s("rect", { x: tipX, y: tipY, width: 150, height: 76, rx: 6 }),
        tip.map((line, at) => s("text", { x: tipX + 10, y: tipY + 19 + at * 16 }, line)),
      ),
    );
    // The tips lie above all points, so they are shown from here and not by the style sheet.
    const show = (visibility) => (event) => {
      const shown = event.currentTarget.ownerSVGElement.querySelectorAll(".tip")[index];
      if (shown) shown.style.visibility = visibility;
    };
    const on = {
      pointerenter: show("visible"),
      pointerleave: show(""),
      focus: show("visible"),
      blur: show(""),
    };
    return s(
      "g.point",
      { tabindex: "0", role: "img", "aria-label": text, on },
      s("line.interval", { x1: cx, x2: cx, y1: y(Math.max(kl.low, 10 ** fromY)), y2: y(kl.high) }),
      s("circle.halo", { cx, cy, r: 15 }),
      s("circle.dot", { cx, cy, r: 5.5 }),
      s("text.name", { ...beside, y: cy + drop }, variant.quantisation),
      s("text.size", { ...beside, y: cy + drop + 14 }, bytes(variant.size_bytes)),
    );
  });
  return h(
    "figure.chart",
    null,
    s(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "group",
        "aria-label":
          "Quality over size: KL divergence from the reference against file size, one point for each variant",
      },
      grid,
      s(
        "text.axis",
        { x: (PAD.left + WIDTH - PAD.right) / 2, y: HEIGHT - 8, "text-anchor": "middle" },
        "size, MB",
      ),
      s(
        "text.axis",
        {
          x: -(PAD.top + HEIGHT - PAD.bottom) / 2,
          y: 15,
          "text-anchor": "middle",
          transform: "rotate(-90)",
        },
        "KL divergence, nats per token",
      ),
      s("path.front", { d: path }),
      drawn,
      tips,
    ),
    h(
      "figcaption",
      null,
      "Lower and further left is better. Bars are 95 % confidence intervals; the axis of the divergence is logarithmic.",
    ),
  );
}

/** A loss with its interval against what is allowed, which is the dashed line. */
export function lossAgainstAllowed({ loss, allowed }) {
  const from = Math.min(loss.low, 0);
  const to = Math.max(loss.high, allowed);
  const x = (value) => 3 + ((value - from) / (to - from || 1)) * 154;
  return s(
    "svg.loss",
    { viewBox: "0 0 160 16", "aria-hidden": "true" },
    s("line.loss-axis", { x1: 0, x2: 160, y1: 8, y2: 8 }),
    s("line.loss-zero", { x1: x(0), x2: x(0), y1: 5, y2: 11 }),
    s("line.loss-range", { x1: x(loss.low), x2: x(loss.high), y1: 8, y2: 8 }),
    s("circle.loss-mean", { cx: x(loss.mean), cy: 8, r: 3.5 }),
    s("line.loss-allowed", { x1: x(allowed), x2: x(allowed), y1: 0, y2: 16 }),
  );
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const digit = [1, 2, 2.5, 5, 10].find((it) => it * power >= rough) ?? 10;
  return digit * power;
}

/**
 * Lines over time: `[{ name, dashed, points: [{ at, value, high }] }]`, each with a fainter one for
 * its high values. `write` turns a value into text; `from` and `to` are the ends of time.
 */
export function timeline(lines, { label, write, from, to }) {
  const width = 400;
  const height = 170;
  const pad = { left: 58, right: 10, top: 10, bottom: 24 };
  const values = lines.flatMap((line) => line.points.flatMap((it) => [it.value, it.high ?? 0]));
  const highest = Math.max(...values, 0);
  const step = niceStep((highest || 1) / 3);
  const top = step * Math.max(1, Math.ceil(highest / step));
  const x = (at) => pad.left + ((at - from) / (to - from)) * (width - pad.left - pad.right);
  const y = (value) => height - pad.bottom - (value / top) * (height - pad.top - pad.bottom);
  const path = (points, of) =>
    points
      .map((it, at) => `${at ? "L" : "M"}${x(it.at).toFixed(1)} ${y(of(it)).toFixed(1)}`)
      .join("");
  const grid = [];
  for (let value = 0; value <= top + step / 2; value += step) {
    const at = y(value);
    grid.push(
      s("line.grid", { x1: pad.left, x2: width - pad.right, y1: at, y2: at }),
      s("text.tick", { x: pad.left - 7, y: at + 4, "text-anchor": "end" }, write(value)),
    );
  }
  const days = (to - from) / 86_400_000 > 3;
  const moment = (at) => {
    const [day, time] = clock(at).split(" ");
    return days ? day.slice(5) : `${day.slice(5)} ${time.slice(0, 5)}`;
  };
  const ends = [
    s("text.tick", { x: pad.left, y: height - 6 }, moment(from)),
    s("text.tick", { x: width - pad.right, y: height - 6, "text-anchor": "end" }, moment(to)),
  ];
  const drawn = lines.map(({ name, dashed, points }) => {
    const high = points.filter((it) => it.high !== undefined);
    return s(
      dashed ? "g.series.dashed" : "g.series",
      null,
      high.length > 1 && s("path.high", { d: path(high, (it) => it.high) }),
      points.length > 1 && s("path.line", { d: path(points, (it) => it.value) }),
      points.map((it) =>
        s(
          "circle.dot",
          { cx: x(it.at).toFixed(1), cy: y(it.value).toFixed(1), r: 2.6 },
          s("title", null, `${name}, ${moment(it.at)}: ${write(it.value)}`),
        ),
      ),
    );
  });
  const last = lines
    .filter((line) => line.points.length)
    .map((line) => `${line.name} ${write(line.points.at(-1).value)}`);
  return h(
    "figure.chart.timeline-chart",
    null,
    s(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        role: "img",
        "aria-label": `${label}, last: ${last.join(", ") || "nothing"}`,
      },
      grid,
      ends,
      drawn,
    ),
    h("figcaption", null, label),
  );
}

/** A line over time: `[{ at, value }]`, oldest first. */
export function sparkline(samples, { unit, label }) {
  const width = 320;
  const height = 64;
  const highest = Math.max(...samples.map((sample) => sample.value), 0);
  const step = niceStep(Math.max(highest, 1) / 2);
  const top = step * Math.max(2, Math.ceil(highest / step));
  const now = samples.at(-1)?.at ?? 0;
  const span = Math.max(now - (samples[0]?.at ?? now), 60_000);
  const x = (at) => width - 4 - ((now - at) / span) * (width - 8);
  const y = (value) => height - 4 - (value / top) * (height - 10);
  const line = samples
    .map(
      (sample, at) => `${at ? "L" : "M"}${x(sample.at).toFixed(1)} ${y(sample.value).toFixed(1)}`,
    )
    .join("");
  const last = samples.at(-1);
  const area =
    samples.length > 1
      ? `${line}L${x(last.at)} ${height - 4}L${x(samples[0].at)} ${height - 4}Z`
      : "";
  return h(
    "figure.spark",
    null,
    s(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        role: "img",
        preserveAspectRatio: "none",
        "aria-label": `${label}: now ${number(last?.value ?? 0)} ${unit}, highest ${number(highest)} ${unit}`,
      },
      s("line.grid", { x1: 0, x2: width, y1: height - 4, y2: height - 4 }),
      s("line.grid.minor", { x1: 0, x2: width, y1: y(top), y2: y(top) }),
      area && s("path.area", { d: area }),
      samples.length > 1 && s("path.line", { d: line }),
    ),
    h(
      "figcaption",
      null,
      h("span", null, `0 to ${number(top)} ${unit}`),
      h(
        "span",
        null,
        samples.length > 1
          ? `last ${Math.round(span / 1000)} s`
          : "collecting while this page is open",
      ),
    ),
  );
}
