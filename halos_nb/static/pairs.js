// PairBrowser: filters, a picture, a list, and one pair at a time. The kernel sends numbers of
// all pairs once, texts of one page at a time.
const PAGE = 25; // pairs in the list
const BINS = 30; // bars of a histogram
const PICTURES = {
  "margin and length": ["margin", "length"],
  scores: ["rejected", "chosen"],
  margins: ["margin"],
  lengths: ["length"],
};
const AXES = {
  margin: "margin (chosen - rejected)",
  length: "length difference (characters)",
  chosen: "score of chosen",
  rejected: "score of rejected",
};
const SORTS = {
  "": "as in the file",
  margin: "margin",
  near: "distance from a tie",
  length: "length difference",
  round: "round",
  disputed: "disagreement",
  chosen: "score of chosen",
  rejected: "score of rejected",
};
// as in the figures
const [GREY, PALE, BLUE, ORANGE] = ["#8A9099", "#C9CED6", "#0072B2", "#D55E00"];

const isNumber = (x) => x === x;
const tell = (x, digits = 3) => (x == null || Number.isNaN(x) ? "–" : (+x).toFixed(digits));
const digits = (x) => (Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(2));
const along = (x, [a, b], from, to) => from + ((x - a) / (b - a)) * (to - from);

// Lowest and highest of some numbers, never the same.
function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const x of values) {
    if (x < low) low = x;
    if (x > high) high = x;
  }
  if (low > high) return [0, 1];
  return low === high ? [low - 1, high + 1] : [low, high];
}

// Runs it once typing pauses.
function later(run) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, 80);
  };
}

function checkbox(name, onchange) {
  return el("input", { type: "checkbox", name, onchange });
}

function numberField(name, title, onchange, extra = {}) {
  const kind = { type: "number", step: "any", ...extra };
  return el("input", { name, title, "aria-label": title, onchange, ...kind });
}

function searchField(name, placeholder, title, oninput) {
  const kind = { type: "search", size: "14", oninput: later(oninput) };
  return el("input", { name, placeholder, "aria-label": title, ...kind });
}

// options: value -> what the menu says
function menu(name, title, options, onchange) {
  const option = ([value, text]) => el("option", { value }, text);
  const entries = Object.entries(options).map(option);
  return el("select", { name, title, "aria-label": title, onchange }, ...entries);
}

function render({ model, el: host }) {
  const view = {
    columns: {}, // name -> a number for each pair
    order: new Int32Array(), // numbers of the pairs kept
    total: 0,
    flags: new Set(),
    place: 0, // in the order, of the pair shown
    page: -1, // of the list
    rows: [], // of that page
    pair: null,
    diff: false,
  };
  const fields = {
    text: searchField("text", "search", "only pairs that contain this text", filter),
    round: menu("round", "round", { "": "all rounds" }, filter),
    low: numberField("low", "smallest margin", filter),
    high: numberField("high", "largest margin", filter),
    short: numberField("short", "smallest length difference", filter),
    long: numberField("long", "largest length difference", filter),
    disputed: checkbox("disputed", filter),
    flagged: checkbox("flagged", filter),
    sort: menu("sort", "sort by", SORTS, filter),
    down: checkbox("down", filter),
    mark: searchField(
      "mark",
      "highlight (regex)",
      "highlight what matches this regular expression",
      highlight,
    ),
    jump: numberField("jump", "pair number", jumpToNumber, { min: "1", step: "1" }),
    picture: menu(
      "picture",
      "picture",
      Object.fromEntries(Object.keys(PICTURES).map((name) => [name, name])),
      draw,
    ),
  };
  const canvas = el("canvas", {
    role: "img",
    "aria-label": "All pairs; click a point or a bar to see a pair",
    tabindex: "-1",
  });
  const status = el("div", { class: "status" });
  const count = el("span", { class: "number" });
  const list = el("div", { class: "list", role: "listbox", "aria-label": "Pairs" });
  const pager = el("div", { class: "bar" });
  const detail = el("div", { class: "detail" });
  const link = connect(model, status, receive);

  // ---- what is asked of the kernel, and what it answers

  function filter() {
    const value = (field) => (field.value === "" ? null : +field.value);
    link.ask({
      do: "filter",
      text: fields.text.value,
      round: fields.round.value,
      margin: [value(fields.low), value(fields.high)],
      length: [value(fields.short), value(fields.long)],
      disputed: fields.disputed.checked,
      flagged: fields.flagged.checked,
      sort: fields.sort.value,
      down: fields.down.checked,
    });
  }

  function clear() {
    const names = ["text", "round", "low", "high", "short", "long"];
    for (const name of names) fields[name].value = "";
    fields.disputed.checked = false;
    fields.flagged.checked = false;
    filter();
  }

  function receive(message, buffers) {
    if (message.columns) receiveColumns(message, buffers);
    else if (message.kept != null) receiveOrder(message, buffers[0]);
    else receivePair(message);
  }

  function receiveColumns({ columns, rounds, total, flags }, buffers) {
    columns.forEach((name, k) => {
      const { buffer, byteOffset } = buffers[k];
      view.columns[name] = new Float32Array(buffer, byteOffset, total);
    });
    fields.round.append(...rounds.map((round) => el("option", { value: round }, round)));
    view.total = total;
    view.flags = new Set(flags);
    filter();
  }

  function receiveOrder({ kept }, { buffer, byteOffset }) {
    const here = view.pair?.i ?? -1;
    view.order = new Int32Array(buffer, byteOffset, kept);
    view.page = -1;
    view.place = Math.max(0, view.order.indexOf(here));
    const [some, all] = [kept, view.total].map((n) => n.toLocaleString("en"));
    count.textContent = `${some} of ${all} pairs`;
    root.dataset.kept = kept;
    if (kept) return go(view.place);
    view.pair = null;
    list.replaceChildren();
    pager.replaceChildren();
    detail.replaceChildren("No pair is left; loosen a filter.");
    draw();
  }

  function receivePair({ pair, rows, flags }) {
    if (flags) view.flags = new Set(flags);
    if (rows) view.rows = rows;
    if (rows || flags) showRows();
    if (pair) view.pair = pair;
    if (pair || flags) show();
    if (pair) draw();
  }

  // ---- moving about

  // To a place in the order; otherwise: what is said where there is none.
  function go(place, otherwise) {
    if (place < 0 || place >= view.order.length) {
      if (otherwise) status.textContent = otherwise;
      return;
    }
    const page = Math.floor(place / PAGE);
    const turned = page !== view.page;
    const shown = view.order.slice(page * PAGE, (page + 1) * PAGE);
    view.place = place;
    link.ask({ do: "show", i: view.order[place], rows: turned ? Array.from(shown) : null });
    if (!turned) markRow();
    view.page = page;
  }

  // To a pair, be it among those kept or not.
  function jump(i) {
    const place = view.order.indexOf(i);
    if (place < 0) link.ask({ do: "show", i });
    else go(place);
  }

  function jumpToNumber() {
    const number = fields.jump.value;
    go(view.order.indexOf(number - 1), `pair ${number} is not among those kept`);
  }

  // ---- the list

  function showRows() {
    const row = ({ i, margin, text }, k) => {
      const click = () => {
        go(view.page * PAGE + k);
        root.focus();
      };
      const flag = view.flags.has(i) ? "⚑ " : "";
      const looks = { class: "row", role: "option", "data-i": i, onclick: click };
      return el("button", looks, el("span", {}, flag + tell(margin, 2)), el("span", {}, text));
    };
    list.replaceChildren(...view.rows.map(row));
    const last = Math.ceil(view.order.length / PAGE) - 1;
    const turn = (text, by, label, disabled) => {
      const click = () => go((view.page + by) * PAGE);
      return el("button", { onclick: click, disabled, "aria-label": label }, text);
    };
    pager.replaceChildren(
      turn("‹", -1, "page before", view.page === 0),
      `page ${view.page + 1} of ${last + 1}`,
      turn("›", 1, "next page", view.page === last),
    );
    markRow();
  }

  function markRow() {
    for (const row of list.children) {
      const here = +row.dataset.i === view.order[view.place];
      row.classList.toggle("here", here);
      row.setAttribute("aria-selected", here);
      if (here) list.scrollTop = Math.max(0, row.offsetTop - list.offsetTop - 160);
    }
  }

  // ---- one pair

  // What is to be highlighted; null if nothing is, or if it is no regular expression.
  function pattern() {
    const field = fields.mark;
    field.setCustomValidity("");
    if (!field.value) return null;
    try {
      return new RegExp(field.value, "giu");
    } catch (error) {
      field.setCustomValidity(String(error));
      field.reportValidity();
      return null;
    }
  }

  function highlight() {
    view.diff = false;
    show();
  }

  function button(text, title, pressed, onclick) {
    const click = () => {
      onclick();
      root.focus();
    };
    return el("button", { title, "aria-pressed": String(pressed), onclick: click }, text);
  }

  function show() {
    const pair = view.pair;
    if (!pair) return;
    const marked = pattern();
    const [a, b] = view.diff
      ? diffed(pair.A.text, pair.B.text)
      : [plain(pair.A.text, marked), plain(pair.B.text, marked)];
    detail.replaceChildren(
      headOf(pair),
      turns(pair.prompt, marked),
      el("div", { class: "two" }, sideOf(pair, "A", a), sideOf(pair, "B", b)),
      pair.said.length ? labellersTable(pair.said) : "",
      pair.same.length > 1 ? samePrompt(pair) : "",
    );
    detail.dataset.i = pair.i;
  }

  function headOf(pair) {
    const margin = `margin ${tell(pair.margin)}`;
    const facts = `${pair.round} · ${margin} · length difference ${pair.length}`;
    return el(
      "div",
      { class: "bar" },
      el("b", {}, `Pair ${pair.i + 1}`),
      facts,
      button("diff", "key d", view.diff, () => press("d")),
      button("⚑ flag", "key f", view.flags.has(pair.i), () => press("f")),
    );
  }

  function sideOf(pair, name, text) {
    const { chosen, reward, length } = pair[name];
    const verdict = chosen ? "chosen ✓" : "rejected";
    const size = `${length.toLocaleString("en")} characters`;
    const head = `${name}: ${verdict} · reward ${tell(reward)} · ${size}`;
    const looks = { class: `side ${chosen ? "chosen" : "rejected"}`, "data-side": name };
    return el("div", looks, el("div", { class: "head" }, head), text);
  }

  function labellersTable(said) {
    const row = ({ labeller, winner, margin }) =>
      el(
        "tr",
        {},
        el("td", {}, labeller),
        el("td", {}, winner === "tie" ? "tie" : `${winner} is better`),
        el("td", { class: "number" }, tell(margin)),
      );
    const caption = el("caption", {}, "What labellers say");
    return el("table", { class: "said" }, caption, ...said.map(row));
  }

  // Pairs of the same prompt, in this round and in others.
  function samePrompt(pair) {
    const other = ({ i, round, margin }) =>
      button(`${round}: ${tell(margin, 2)}`, `pair ${i + 1}`, i === pair.i, () => jump(i));
    const more = pair.same_total - pair.same.length;
    return el(
      "div",
      { class: "bar" },
      "Same prompt:",
      ...pair.same.map(other),
      more > 0 ? `and ${more} more` : "",
    );
  }

  // ---- the picture

  // What the picture shows, and where on the canvas; without y it is a histogram.
  function axes() {
    const [x, y] = PICTURES[fields.picture.value];
    const [xs, ys] = [view.columns[x], y && view.columns[y]];
    return { x, y, xs, ys, rx: range(xs), ry: y && range(ys), box: [52, 10, 290, 182] };
  }

  // How many of all pairs, and of those kept, are in each bin.
  function histogram(at) {
    const [all, kept] = [new Uint32Array(BINS), new Uint32Array(BINS)];
    const bin = (x) => Math.min(BINS - 1, Math.floor(along(x, at.rx, 0, BINS)));
    for (const x of at.xs) if (isNumber(x)) all[bin(x)]++;
    for (const i of view.order) if (isNumber(at.xs[i])) kept[bin(at.xs[i])]++;
    return { all, kept, most: Math.max(1, ...all) };
  }

  function drawAxes(c, at, top) {
    const [l, t, r, b] = at.box;
    c.fillStyle = getComputedStyle(root).color;
    c.strokeStyle = GREY;
    c.strokeRect(l, t, r - l, b - t);
    c.font = "12px sans-serif";
    c.fillText(digits(at.rx[0]), l, b + 14);
    c.textAlign = "right";
    c.fillText(digits(at.rx[1]), r, b + 14);
    c.fillText(digits(top), l - 4, t + 10);
    c.fillText(at.y ? digits(at.ry[0]) : "0", l - 4, b);
    c.textAlign = "center";
    c.fillText(AXES[at.x], (l + r) / 2, b + 30);
    c.save();
    c.translate(14, (t + b) / 2);
    c.rotate(-Math.PI / 2);
    c.fillText(at.y ? AXES[at.y] : "pairs", 0, 0);
    c.restore();
  }

  function drawPoints(c, at) {
    const [l, t, r, b] = at.box;
    const many = view.order.length > 2000;
    const points = (indices, size, color, alpha) => {
      c.globalAlpha = alpha;
      c.fillStyle = color;
      for (const i of indices) {
        const x = along(at.xs[i], at.rx, l, r);
        const y = along(at.ys[i], at.ry, b, t);
        c.fillRect(x - size / 2, y - size / 2, size, size);
      }
    };
    if (view.order.length < view.total) points(Array(view.total).keys(), 2, PALE, 0.5);
    points(view.order, many ? 2.5 : 4, BLUE, many ? 0.35 : 0.7);
    c.globalAlpha = 1;
  }

  function drawBars(c, at, { all, kept, most }) {
    const [l, t, r, b] = at.box;
    const width = (r - l) / BINS;
    for (let k = 0; k < BINS; k++) {
      for (const [n, color] of [[all[k], PALE], [kept[k], BLUE]]) {
        const height = (n / most) * (b - t);
        c.fillStyle = color;
        c.fillRect(l + k * width, b - height, width - 1, height);
      }
    }
  }

  // A ring around the point of the pair shown, or a line in a histogram.
  function drawHere(c, at) {
    const [, t, , b] = at.box;
    const [x, y] = placeOf(view.pair.i, at);
    c.strokeStyle = ORANGE;
    c.lineWidth = 2;
    c.beginPath();
    if (at.y) {
      c.arc(x, y, 6, 0, 7);
    } else {
      c.moveTo(x, t);
      c.lineTo(x, b);
    }
    c.stroke();
  }

  function draw() {
    if (!view.columns.margin) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = 300 * ratio;
    canvas.height = 220 * ratio;
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    const at = axes();
    const bars = at.y ? null : histogram(at);
    drawAxes(c, at, at.y ? at.ry[1] : bars.most);
    if (at.y) drawPoints(c, at);
    else drawBars(c, at, bars);
    if (view.pair && isNumber(at.xs[view.pair.i])) drawHere(c, at);
  }

  // Where on the canvas a pair is.
  function placeOf(i, at) {
    const [l, t, r, b] = at.box;
    const y = at.y ? along(at.ys[i], at.ry, b, t) : (t + b) / 2;
    return [along(at.xs[i], at.rx, l, r), y];
  }
  canvas.place = (i) => placeOf(i, axes()); // for those who look from outside

  // A bar was clicked: the filter keeps its pairs.
  function filterBar(at, x) {
    const [l, , r] = at.box;
    const bin = Math.floor(along(x, [l, r], 0, BINS));
    if (bin < 0 || bin >= BINS) return;
    const edge = (k) => +(at.rx[0] + (k * (at.rx[1] - at.rx[0])) / BINS).toPrecision(6);
    const margin = at.x === "margin";
    (margin ? fields.low : fields.short).value = edge(bin);
    (margin ? fields.high : fields.long).value = edge(bin + 1);
    filter();
  }

  // A point was clicked: to the nearest pair, if it is near.
  function goNearest(at, x, y) {
    let [best, near] = [-1, 12 ** 2]; // square of pixels
    view.order.forEach((i, place) => {
      const [px, py] = placeOf(i, at);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < near) [best, near] = [place, distance];
    });
    go(best, "no pair is near this point");
  }

  canvas.addEventListener("click", (event) => {
    const at = axes();
    root.focus();
    if (at.y) goNearest(at, event.offsetX, event.offsetY);
    else filterBar(at, event.offsetX);
  });

  // ---- keys

  // A key; whether it was one of ours.
  function press(key) {
    if (["j", "ArrowDown", "ArrowRight"].includes(key)) {
      go(view.place + 1);
    } else if (["k", "ArrowUp", "ArrowLeft"].includes(key)) {
      go(view.place - 1);
    } else if (key === "d") {
      view.diff = !view.diff;
      show();
    } else if (key === "f" && view.pair) {
      const i = view.pair.i;
      link.ask({ do: "flag", i, on: !view.flags.has(i) });
    } else if (key === "/") {
      fields.text.focus();
    } else {
      return false;
    }
    return true;
  }

  // ---- where things stand

  const bar = (...children) => el("div", { class: "bar" }, ...children);
  const label = (text, ...children) => el("label", {}, text, ...children);
  const hint = (key, text) => [el("kbd", {}, key), ` ${text} `];
  const filters = bar(
    fields.text,
    fields.round,
    label("margin", fields.low, "to", fields.high),
    label("length", fields.short, "to", fields.long),
    label("", fields.disputed, "labellers disagree"),
    label("", fields.flagged, "flagged"),
    el("button", { onclick: clear }, "clear"),
  );
  const exported = {
    class: "export",
    onclick: () => link.ask({ do: "export" }),
    title: "write the pairs kept as a feedback file",
  };
  const order = bar(
    label("sort", fields.sort),
    label("", fields.down, "largest first"),
    fields.mark,
    label("pair", fields.jump),
    count,
    el("button", exported, "export these"),
  );
  const overview = el("div", {}, label("picture", fields.picture), canvas, list, pager);
  const keys = el(
    "div",
    {},
    ...hint("j", "next"),
    ...hint("k", "before"),
    ...hint("d", "word diff"),
    ...hint("f", "flag"),
    ...hint("/", "search"),
  );
  const browser = el("div", { class: "browser" }, overview, detail);
  const root = frame(filters, order, status, browser, keys);
  for (const field of root.querySelectorAll("input")) {
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape" || event.key === "Enter") root.focus();
    });
  }
  onKeys(root, press);
  host.append(root);
  link.ask({ do: "open" });
}

export default { render };
