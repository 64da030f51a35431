// RunMonitor's panel. Every text of a run reaches the page through textContent.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "rect", "line", "text", "path", "circle"]);
const WIDTH = 320, HEIGHT = 150; // of a picture, in its own units
const LEFT = 48, RIGHT = WIDTH - 98, TOP = 8, BOTTOM = HEIGHT - 22; // of its frame

// A new element at the end of another.
function add(parent, tag, attributes = {}, text = null) {
  const shape = SHAPES.has(tag);
  const element = shape ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

// A number with three digits; a dash where there is none.
function digits(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(3)));
}

// From values to places: `low` lies at `from` and `high` at `to`; a single value in the middle.
function scale(low, high, from, to) {
  if (!(high > low)) return () => (from + to) / 2;
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

const lastValue = (curve) => curve.y.filter((y) => y !== null).at(-1);
const described = (curve, value) => `${curve.name} ${digits(value)}`.trim();

// A curve as an SVG path; where a value is missing, the pen is lifted.
function pathOf(curve, X, Y) {
  let path = "", pen = "M";
  curve.y.forEach((y, i) => {
    if (y === null) {
      pen = "M";
      return;
    }
    path += `${pen}${X(curve.x[i]).toFixed(1)},${Y(y).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

// The index of the point whose x lies nearest to a place in the picture.
function nearest(curve, X, place) {
  let best = 0;
  curve.x.forEach((x, i) => {
    if (Math.abs(X(x) - place) < Math.abs(X(curve.x[best]) - place)) best = i;
  });
  return best;
}

// One picture: a frame, where rounds end, the curves with their last values, the axes' ends.
function draw(box, panel) {
  const lines = panel.lines;
  const xs = lines.flatMap((c) => c.x);
  const ys = lines.flatMap((c) => c.y).filter((y) => y !== null);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const X = scale(x0, x1, LEFT, RIGHT);
  const Y = scale(y0, y1, BOTTOM, TOP);
  const nameOf = (x) => (panel.names.length ? panel.names[x] : x);
  const said = lines.map((c) => described(c, lastValue(c))).join(", ");

  const title = add(box, "div", { class: "title" }, panel.title);
  const label = `${panel.title}, last: ${said}`;
  const viewBox = `0 0 ${WIDTH} ${HEIGHT}`;
  const svg = add(box, "svg", { viewBox, role: "img", "aria-label": label });
  const frame = { x: LEFT, y: TOP, width: RIGHT - LEFT, height: BOTTOM - TOP };
  add(svg, "rect", { ...frame, class: "frame" });
  for (const end of panel.ends) {
    const x = X(end + 0.5);
    add(svg, "line", { x1: x, x2: x, y1: TOP, y2: BOTTOM, class: "end" });
  }
  if (ys.length) {
    for (const y of new Set([y0, y1])) {
      add(svg, "text", { x: LEFT - 5, y: Y(y) + 4, "text-anchor": "end" }, digits(y));
    }
  }
  for (const x of new Set([x0, x1])) {
    const text = `${x === x0 ? panel.x + " " : ""}${nameOf(x)}`;
    add(svg, "text", { x: X(x), y: BOTTOM + 15, "text-anchor": "middle" }, text);
  }
  const taken = []; // heights at which a label stands
  for (const curve of lines) {
    add(svg, "path", { d: pathOf(curve, X, Y), stroke: curve.color, class: "curve" });
    if (curve.x.length < 40) {
      curve.y.forEach((y, i) => {
        if (y === null) return;
        add(svg, "circle", { cx: X(curve.x[i]), cy: Y(y), r: 2.5, fill: curve.color });
      });
    }
    let y = Y(lastValue(curve) ?? y0) + 4;
    while (taken.some((other) => Math.abs(other - y) < 12)) y += 12;
    taken.push(y);
    if (ys.length) {
      const text = described(curve, lastValue(curve));
      add(svg, "text", { x: RIGHT + 5, y, fill: curve.color, class: "label" }, text);
    }
  }
  svg.onmousemove = (event) => {
    const seen = svg.getBoundingClientRect();
    const place = ((event.clientX - seen.left) * WIDTH) / seen.width;
    const at = lines[0].x[nearest(lines[0], X, place)];
    const values = lines.map((c) => described(c, c.y[nearest(c, X, place)]));
    title.textContent = `${panel.x} ${nameOf(at)}: ${values.join(", ")}`;
  };
  svg.onmouseleave = () => {
    title.textContent = panel.title;
  };
}

function render({ model, el }) {
  el.classList.add("halos-monitor");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's keys stay out
  const top = add(el, "div", { class: "top" });
  const badge = add(top, "b", { class: "badge" });
  const bar = add(top, "progress", { max: 1, "aria-label": "share of the stage that is done" });
  const text = add(top, "span", { class: "text" });
  const hint = "End what is running of this run; start it again and it goes on from here";
  const stop = add(top, "button", { type: "button", title: hint }, "Stop");
  const warning = add(el, "div", { class: "warning", role: "alert" });
  const grid = add(el, "div", { class: "grid" });
  const more = add(el, "details");
  const head = add(more, "summary", {}, "Log");
  const log = add(more, "pre");

  stop.onclick = () => {
    stop.disabled = true;
    stop.textContent = "Stopping…";
    model.send({ stop: true });
  };

  function showStatus() {
    const status = model.get("status");
    badge.textContent = status.state;
    badge.dataset.state = status.state;
    text.textContent = status.text;
    warning.textContent = status.warning;
    warning.hidden = !status.warning;
    bar.hidden = status.share === null;
    bar.value = status.share ?? 0;
    stop.disabled = status.state !== "running" || status.stopping;
    stop.textContent = status.stopping ? "Stopping…" : "Stop";
    log.textContent = status.log.join("\n");
    head.textContent = `Log, last ${status.log.length} lines`;
    more.hidden = !status.log.length;
  }

  function showCurves() {
    grid.replaceChildren();
    for (const panel of model.get("curves")) draw(add(grid, "div", { class: "panel" }), panel);
  }

  model.on("change:status", showStatus);
  model.on("change:curves", showCurves);
  showStatus();
  showCurves();
  return () => {
    model.off("change:status", showStatus);
    model.off("change:curves", showCurves);
  };
}

export default { render };
