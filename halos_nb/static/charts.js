// The charts of a run's panel: in the notebook (monitor.js) and on the report page (page.js).
// `figures.chart_html` draws the same ones for a page without scripts. Every text reaches the page
// through textContent.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "path", "rect"]);
const SIDE = 1000; // of a picture, in its own units; the page stretches it

// A new element at the end of another.
function add(parent, tag, attributes = {}, text = null) {
  const shape = SHAPES.has(tag);
  const element = shape ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

const known = (values) => values.filter((value) => value !== null && value !== undefined);
const minus = (text) => text.replace("-", "\u2212");

// A number with three digits; a dash where there is none.
function digits(value, suffix = "") {
  if (value === null || value === undefined) return "–";
  return minus(String(Number(value.toPrecision(3)))) + suffix;
}

// Steps of 1, 2 or 5 between two values, about so many; on a log axis the powers of ten. Whole:
// there is nothing between two whole numbers.
function niceTicks(low, high, most, log, whole = false) {
  if (log) {
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const m of [1, 3]) if (m * 10 ** e >= low && m * 10 ** e <= high) ticks.push(m * 10 ** e);
    }
    return ticks.length > 1 ? ticks : [low, high];
  }
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const nice = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.75);
  const step = whole && high - low >= 1 ? Math.max(nice, 1) : nice;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

// From values to places between 0 and 1.
function scale(low, high, log) {
  const f = log ? Math.log10 : (x) => x;
  const [a, b] = [f(low), f(high)];
  return (value) => (b > a ? (f(value) - a) / (b - a) : 0.5);
}

// Mean over a window around each value, inside its round; missing values stay missing.
function smoothed(line, share, ends) {
  const half = Math.round((line.y.length * share) / 200);
  if (!half) return line.y;
  const round = line.x.map((x) => ends.filter((end) => x > end).length);
  return line.y.map((y, i) => {
    if (y === null) return null;
    let [sum, n] = [0, 0];
    for (let j = Math.max(0, i - half); j <= Math.min(line.y.length - 1, i + half); j++) {
      if (round[j] !== round[i] || line.y[j] === null) continue;
      sum += line.y[j];
      n++;
    }
    return sum / n;
  });
}

// A line as an SVG path; where a value is missing, the pen is lifted.
function pathOf(line, y, X, Y) {
  let path = "", pen = "M";
  y.forEach((value, i) => {
    if (value === null) {
      pen = "M";
      return;
    }
    const [across, up] = [X(line.x[i]).toFixed(1), Y(value).toFixed(1)];
    path += line.step && pen === "L" ? `H${across}V${up}` : `${pen}${across},${up}`;
    pen = "L";
  });
  return path;
}

// The index of the point whose x lies nearest to a value.
function nearest(line, x) {
  let best = 0;
  line.x.forEach((other, i) => {
    if (Math.abs(other - x) < Math.abs(line.x[best] - x)) best = i;
  });
  return best;
}

function described(line, i, suffix) {
  const low = line.low?.[i] ?? null;
  const span = low === null ? "" : ` [${digits(low, suffix)}, ${digits(line.high[i], suffix)}]`;
  return `${line.name} ${digits(line.y[i], suffix)}${span}`.trim();
}

// What a chart shows of its values: the ends of both axes, and whether it is logarithmic.
function extent(chart, view) {
  const all = chart.lines.flatMap((line) => known(line.x));
  const least = Math.min(...all), most = Math.max(...all);
  // a point at an end is drawn whole, as wide as it is
  const room = chart.names.length ? 0.4 : 0.02 * (most - least) || 0.5;
  const [x0, x1] = view.zoom[chart.title] ?? [least - room, most + room];
  const seen = [];
  for (const line of chart.lines) {
    line.x.forEach((x, i) => {
      if (x < x0 || x > x1) return;
      seen.push(...known([line.y[i], line.low?.[i], line.high?.[i]]));
    });
  }
  if (!seen.length) return null;
  let [y0, y1] = [Math.min(...seen), Math.max(...seen)];
  const log = view.log && y0 > 0 && y1 > y0;
  if (!log) {
    if (chart.zero) y0 = Math.min(0, y0);
    const pad = y1 > y0 ? 0.06 * (y1 - y0) : Math.abs(y0) * 0.1 || 0.5;
    y0 = chart.zero && y0 === 0 ? 0 : y0 - pad;
    y1 += pad;
  }
  return { x0, x1, y0, y1, log };
}

function axes(plot, chart, seen, X, Y) {
  for (const tick of niceTicks(seen.y0, seen.y1, 4, seen.log)) {
    const label = add(plot, "span", { class: "y" }, digits(tick, chart.suffix));
    label.style.top = `${Y(tick) / 10}%`;
  }
  let places = chart.names.map((_, i) => i).filter((i) => i >= seen.x0 && i <= seen.x1);
  const every = Math.ceil(places.length / 6);
  if (chart.names.length) places = places.filter((_, i) => i % every === 0);
  else places = niceTicks(seen.x0, seen.x1, 4, false, chart.x === "step");
  for (const place of places) {
    const text = chart.names.length ? chart.names[place] : minus(place.toLocaleString("en"));
    const label = add(plot, "span", { class: "x" }, text);
    label.style.left = `${X(place) / 10}%`;
  }
}

function shapes(svg, chart, view, seen, X, Y) {
  const still = { fill: "none", "vector-effect": "non-scaling-stroke" };
  for (const end of chart.ends) {
    const x = X(end + 0.5);
    if (x > 0 && x < SIDE) add(svg, "path", { ...still, class: "end", d: `M${x},0V${SIDE}` });
  }
  for (const line of chart.lines) {
    const smooth = chart.x === "step" && view.smooth > 0;
    const y = smooth ? smoothed(line, view.smooth, chart.ends) : line.y;
    const pale = { stroke: line.color, "stroke-width": 1, opacity: 0.35 };
    if (smooth) add(svg, "path", { ...still, ...pale, d: pathOf(line, line.y, X, Y) });
    const pen = { stroke: line.color, "stroke-width": 2 };
    add(svg, "path", { ...still, ...pen, d: pathOf(line, y, X, Y) });
    if (line.step || line.x.length >= 40) continue;
    line.y.forEach((value, i) => {
      if (value === null || line.x[i] < seen.x0 || line.x[i] > seen.x1) return;
      const stroke = line.colors?.[i] ?? line.color;
      const x = X(line.x[i]).toFixed(1);
      if ((line.low?.[i] ?? null) !== null) {
        const d = `M${x},${Y(line.low[i])}V${Y(line.high[i])}`;
        add(svg, "path", { ...still, stroke, "stroke-width": 2, d });
      }
      const dot = { "stroke-width": 8, "stroke-linecap": "round", d: `M${x},${Y(y[i])}h0.01` };
      add(svg, "path", { ...still, stroke, ...dot });
    });
  }
}

// Dragging over a picture zooms its x axis; a double click shows all again.
function zoomable(plot, svg, chart, view, seen, redraw) {
  let from = null, band = null;
  const place = (event) => {
    const box = svg.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  };
  svg.onpointerdown = (event) => {
    from = place(event);
    svg.setPointerCapture(event.pointerId);
    band = add(plot, "span", { class: "band" });
  };
  svg.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const [a, b] = [from, place(event)].sort((p, q) => p - q);
    Object.assign(band.style, { left: `${100 * a}%`, width: `${100 * (b - a)}%` });
  });
  svg.onpointerup = (event) => {
    const [a, b] = [from, place(event)].sort((p, q) => p - q);
    from = null;
    band.remove();
    if (b - a < 0.03) return;
    const value = (share) => seen.x0 + share * (seen.x1 - seen.x0);
    view.zoom[chart.title] = [value(a), value(b)];
    redraw();
  };
  svg.ondblclick = () => {
    delete view.zoom[chart.title];
    redraw();
  };
}

function drawChart(box, chart, view, redraw) {
  const seen = extent(chart, view);
  const title = add(box, "div", { class: "title" });
  add(title, "b", {}, chart.title);
  const unit = seen?.log ? `${chart.unit}, log axis` : chart.unit;
  const said = add(title, "span", {}, unit ? ` ${unit}` : "");
  const plot = add(box, "div", { class: "plot" });
  const last = chart.lines.map((line) => described(line, line.y.length - 1, chart.suffix));
  const label = `${chart.title}, ${unit}, over the ${chart.x}, last: ${last.join("; ")}`;
  const fit = { viewBox: `0 0 ${SIDE} ${SIDE}`, preserveAspectRatio: "none" };
  const svg = add(plot, "svg", { ...fit, role: "img", "aria-label": label });
  if (seen) {
    const [px, py] = [scale(seen.x0, seen.x1), scale(seen.y0, seen.y1, seen.log)];
    const X = (x) => SIDE * px(x), Y = (y) => SIDE * (1 - py(y));
    axes(plot, chart, seen, X, Y);
    shapes(svg, chart, view, seen, X, Y);
    zoomable(plot, svg, chart, view, seen, redraw);
    svg.onmousemove = (event) => {
      const at = svg.getBoundingClientRect();
      const x = seen.x0 + ((event.clientX - at.left) / at.width) * (seen.x1 - seen.x0);
      const i = nearest(chart.lines[0], x);
      const here = chart.names[chart.lines[0].x[i]] ?? digits(chart.lines[0].x[i]);
      const values = chart.lines.map((line) => described(line, nearest(line, x), chart.suffix));
      said.textContent = ` ${chart.x} ${here}: ${values.join("; ")}`;
    };
    svg.onmouseleave = () => {
      said.textContent = unit ? ` ${unit}` : "";
    };
  }
  const below = add(box, "div", { class: "below" });
  chart.lines.forEach((line, i) => {
    const entry = add(below, "span", { class: "entry" });
    add(entry, "span", { class: "swatch" }).style.background = line.color;
    entry.append(line.step ? line.name : last[i]);
  });
  add(below, "span", { class: "across" }, chart.x);
}

// All charts, with what sets them: smoothing, log axis, zoom. `view` outlives new data.
function drawCharts(root, charts, view) {
  root.classList.add("halos-charts");
  let bar = root.querySelector(".controls");
  let grid = root.querySelector(".grid");
  const redraw = () => {
    bar.querySelector("button").disabled = !Object.keys(view.zoom).length;
    grid.replaceChildren();
    for (const chart of view.charts) {
      drawChart(add(grid, "div", { class: "panel" }), chart, view, redraw);
    }
  };
  view.charts = charts;
  if (!bar) {
    root.replaceChildren();
    bar = add(root, "div", { class: "controls" });
    const smooth = add(bar, "label", {}, "smoothing ");
    const range = { type: "range", min: 0, max: 30, step: 1, value: view.smooth };
    const slider = add(smooth, "input", range);
    const log = add(bar, "label");
    const box = add(log, "input", { type: "checkbox" });
    log.append(" log axis");
    const all = add(bar, "button", { type: "button" }, "whole range");
    add(bar, "span", { class: "hint" }, "drag across a chart to zoom");
    grid = add(root, "div", { class: "grid" });
    slider.oninput = () => {
      view.smooth = Number(slider.value);
      redraw();
    };
    box.onchange = () => {
      view.log = box.checked;
      redraw();
    };
    all.onclick = () => {
      view.zoom = {};
      redraw();
    };
  }
  bar.hidden = !charts.length;
  redraw();
}

const newView = () => ({ smooth: 0, log: false, zoom: {}, charts: [] });
