// PairBrowser: filters, a picture, a list, and one pair at a time. The kernel sends numbers of
// all pairs once, texts of one page at a time.
const PAGE = 25; // pairs in the list
const BINS = 30; // bars of a histogram
const PICTURES = {
  "margin and length difference": ["margin", "difference"],
  "score of chosen and rejected": ["rejected", "chosen"],
  margins: ["margin"],
  "length differences": ["difference"],
  "lengths of the longer": ["length"],
};
const AXES = {
  margin: "margin (chosen − rejected)",
  difference: "length difference (characters)",
  length: "the longer answer (characters)",
  chosen: "score of chosen",
  rejected: "score of rejected",
};
const SORTS = {
  "": "as in the file",
  margin: "margin",
  near: "distance from a tie",
  difference: "length difference",
  length: "length of the longer",
  round: "round",
  disputed: "disagreement",
  chosen: "score of chosen",
  rejected: "score of rejected",
};
// the fields that hold the ends of a column's range
const RANGES = { margin: ["low", "high"], length: ["short", "long"], difference: ["less", "more"] };
const [WIDTH, HEIGHT] = [300, 200]; // of the picture
// as in the figures
const [GREY, PALE, BLUE, ORANGE] = ["#8A9099", "#C9CED6", "#0072B2", "#D55E00"];

const isNumber = (x) => x === x;
// a zero has no sign, whatever was rounded to it
const minus = (text) => text.replace(/^-(?=[0.]*$)/, "").replace("-", "−");
const tell = (x, digits = 3) =>
  x == null || Number.isNaN(x) ? "–" : minus((+x).toFixed(digits));
const whole = (x) => (x == null ? "–" : minus(x.toLocaleString("en")));
const signed = (x) => (x > 0 ? "+" : "") + whole(x);
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

// Round numbers within a range, about five, and how many digits behind the point they need.
function ticks([low, high]) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((k) => k * power >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    found.push(k * step);
  }
  const text = (x) => (digits ? tell(x, Math.min(digits, 6)) : whole(Math.round(x)));
  return found.map((x) => [x, text(x)]);
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

function numberField(name, title, kind) {
  return el("input", { name, title, "aria-label": title, type: "number", step: "any", ...kind });
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
    colors: [], // of the rounds
    notes: {}, // number of a pair -> what was noted
    pair: null,
    diff: false,
    rich: false, // are answers shown as Markdown?
    tokens: null, // of the pair shown, with log-probs
    changing: false, // are tokens shaded by what training changed?
    changed: null, // what it changed in the pair shown; null: nobody was asked
    same: false, // is the prompt followed through the rounds?
  };
  const typed = { oninput: later(filter) }; // numbers filter as they are typed, as the search does
  const fields = {
    text: searchField("text", "search", "only pairs that contain this text", filter),
    round: menu("round", "round", { "": "all rounds" }, filter),
    low: numberField("low", "smallest margin", typed),
    high: numberField("high", "largest margin", typed),
    short: numberField("short", "fewest characters of the longer answer", typed),
    long: numberField("long", "most characters of the longer answer", typed),
    less: numberField("less", "smallest length difference, chosen − rejected", typed),
    more: numberField("more", "largest length difference, chosen − rejected", typed),
    part: menu("part", "part of the pairs", { "": "all parts" }, filter),
    wrong: checkbox("wrong", filter),
    disputed: checkbox("disputed", filter),
    flagged: checkbox("flagged", filter),
    noted: checkbox("noted", filter),
    sort: menu("sort", "sort by", SORTS, sortAnew),
    down: checkbox("down", sortAnew),
    mark: searchField(
      "mark",
      "highlight (regex)",
      "highlight what matches this regular expression",
      highlight,
    ),
    jump: numberField("jump", "pair number", { onchange: jumpToNumber, min: "1", step: "1" }),
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
  const legend = el("div", { class: "legend" });
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
      difference: [value(fields.less), value(fields.more)],
      part: fields.part.value,
      wrong: fields.wrong.checked,
      disputed: fields.disputed.checked,
      flagged: fields.flagged.checked,
      noted: fields.noted.checked,
      sort: fields.sort.value,
      down: fields.down.checked,
    });
  }

  // Who sorts wants to see what comes first.
  function sortAnew() {
    view.pair = null;
    filter();
  }

  function clear() {
    const names = ["text", "round", "low", "high", "short", "long", "less", "more", "part"];
    for (const name of names) fields[name].value = "";
    for (const name of ["wrong", "disputed", "flagged", "noted"]) fields[name].checked = false;
    filter();
  }

  function receive(message, buffers) {
    if (message.columns) receiveColumns(message, buffers);
    else if (message.kept != null) receiveOrder(message, buffers[0]);
    else if (message.history) showSame(message.history);
    else if (message.tokens) receiveTokens(message);
    else if ("changed" in message) receiveChanged(message);
    else receivePair(message);
  }

  function receiveColumns({ columns, rounds, parts, colors, total, flags, notes }, buffers) {
    columns.forEach((name, k) => {
      const { buffer, byteOffset } = buffers[k];
      view.columns[name] = new Float32Array(buffer, byteOffset, total);
    });
    fields.round.append(...rounds.map((round) => el("option", { value: round }, round)));
    fields.part.append(...parts.map((part) => el("option", { value: part }, part)));
    fields.round.hidden = rounds.length < 2;
    list.classList.toggle("one-round", rounds.length < 2);
    showLegend(rounds, colors);
    view.colors = colors;
    view.total = total;
    view.flags = new Set(flags);
    view.notes = notes;
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

  function receivePair({ pair, rows, flags, notes }) {
    if (flags) view.flags = new Set(flags);
    if (notes) view.notes = notes;
    if (rows) view.rows = rows;
    if (rows || flags || notes) showRows();
    if (pair) view.pair = pair;
    if (pair) [view.same, view.tokens, view.changed] = [false, null, null];
    if (pair && view.changing) askChanged([]);
    if (pair || flags || notes) show();
    if (pair) draw();
  }

  // Which colour is which round; of many rounds, the ends.
  function showLegend(rounds, colors) {
    if (rounds.length < 2) return;
    const few = rounds.length <= 4;
    const named = few ? rounds.keys() : [0, rounds.length - 1];
    const chip = (k) => [dot(colors[k]), rounds[k], " "];
    const parts = Array.from(named, chip);
    legend.replaceChildren(...(few ? parts.flat() : [...parts[0], "… ", ...parts[1]]));
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
    const row = ({ i, margin, round, text }, k) => {
      const click = () => {
        go(view.page * PAGE + k);
        root.focus();
      };
      const marks = (view.flags.has(i) ? "⚑" : "") + (i in view.notes ? "✎" : "");
      const looks = { class: "row", role: "option", "data-i": i, onclick: click };
      const place = el("span", { class: "round" }, dot(roundColor(i)), round);
      const told = el("span", { class: margin < 0 ? "negative" : "" }, tell(margin, 2));
      return el("button", looks, told, place, el("span", {}, marks, marks ? " " : "", text));
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

  const dot = (color) => el("span", { class: "dot", style: `background: ${color}` });
  const roundColor = (i) => view.colors[view.columns.round[i]] ?? BLUE;

  function markRow() {
    for (const row of list.children) {
      const here = +row.dataset.i === view.order[view.place];
      row.classList.toggle("here", here);
      row.setAttribute("aria-selected", here);
      if (here) list.scrollTop = row.offsetTop - list.offsetTop - (list.clientHeight - row.offsetHeight) / 2;
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
    const way = view.rich ? markdown : (text) => plain(text, marked);
    const one = (name) => {
      if (view.changed) return gainsOf(view.changed[name]);
      return view.tokens ? shaded(view.tokens[name]) : readPart(pair[name], way);
    };
    const [a, b] = view.diff ? diffed(pair.A.text, pair.B.text) : ["A", "B"].map(one);
    detail.replaceChildren(
      headOf(pair),
      scrolling(turns(pair.prompt, marked)),
      view.changed ? scaleOf(view.changed) : "",
      el("div", { class: "two" }, sideOf(pair, "A", a), sideOf(pair, "B", b)),
      el(
        "div",
        { class: "below" },
        pair.said.length ? labellersTable(pair.said) : "",
        pair.same.length > 1 ? samePrompt(pair) : "",
      ),
    );
    detail.dataset.i = pair.i;
  }

  function receiveTokens({ i, tokens }) {
    if (i !== view.pair?.i) return;
    view.tokens = tokens;
    show();
  }

  // Each token in a shade of how unlikely it was to the policy that drew it.
  function shaded(tokens) {
    const token = ([text, logp]) => {
      const alpha = Math.min(0.6, -logp / 8);
      const told = `log-prob ${tell(logp, 2)}, ${(100 * Math.exp(logp)).toPrecision(2)}%`;
      return el("span", { title: told, style: `background: rgba(213, 94, 0, ${alpha})` }, text);
    };
    const said = "shade: how unlikely to the policy that drew it";
    const key = el("div", { class: "legend" }, said);
    return el("pre", { class: "text", dir: "auto" }, key, ...tokens.map(token));
  }

  // ---- what training changed

  // rows: the pairs that are asked about together; none: only what is known is shown
  function askChanged(rows) {
    const message = { do: "changed", i: view.pair.i, rows };
    const busy = `both policies read ${rows.length} pairs; the models are loaded for that`;
    link.ask(message, rows.length ? busy : "");
  }

  function receiveChanged({ i, changed, steps }) {
    if (i !== view.pair?.i || !view.changing) return;
    view.changed = changed && { ...changed, steps };
    show();
    if (changed) return;
    status.textContent = "no policy was asked of this pair: g asks about those in the list";
  }

  function toggleChanged() {
    view.changing = !(view.changing && view.changed); // of an unknown pair it asks
    [view.changed, view.tokens, view.diff] = [null, null, false];
    const listed = view.rows.map((row) => row.i);
    if (view.changing) askChanged(listed.includes(view.pair.i) ? listed : [view.pair.i]);
    else show();
  }

  // A token in its shade; the shade is said again in words and by a line.
  function gain([text, shade, mark, told]) {
    const rgb = shade > 0 ? "0, 114, 178" : "213, 94, 0";
    const style = `background-color: rgba(${rgb}, ${(0.6 * Math.abs(shade)).toFixed(2)})`;
    const label = `${text}: ${told}`;
    return el("span", { role: "img", title: told, "aria-label": label, class: mark, style }, text);
  }

  function gainsOf({ tokens, words }) {
    const said = el("div", { class: "legend" }, words);
    return el("pre", { class: "text gains", dir: "auto" }, said, ...tokens.map(gain));
  }

  function scaleOf({ scale, steps }) {
    const chips = steps.flatMap((step) => [gain(step), " "]);
    const how = "more likely (underlined from half a nat on, waved where less likely)";
    return el("div", { class: "legend scale" }, "Less likely ", ...chips, how, ": ", scale);
  }

  // An answer; where a model read only its beginning, a line says where it stopped.
  function readPart({ text, cut }, way) {
    if (cut == null) return way(text);
    const said = `the model read no further: ${whole(text.length - cut)} characters were cut`;
    const [read, left] = [way(text.slice(0, cut)), way(text.slice(cut))];
    left.classList.add("unread");
    const line = el("div", { class: "cut", role: "note" }, `✂ ${said} at max_length`);
    return el("div", { class: "text" }, read, line, left);
  }

  function headOf(pair) {
    const number = el("b", {}, `Pair ${whole(pair.i + 1)}`);
    const place = el("span", { class: "round" }, dot(roundColor(pair.i)), pair.round);
    const wrong = pair.margin < 0 ? " (against the label)" : "";
    const facts = `margin ${tell(pair.margin)}${wrong} · length ${signed(pair.difference)}`;
    const count = pair.same_total;
    const note = el("input", {
      class: "note",
      size: "16",
      "aria-label": "note on this pair",
      placeholder: "note (n; Enter saves)",
      onkeydown: noteKey,
    });
    note.value = view.notes[pair.i] ?? "";
    const sources = pair.source ? el("span", {}, pair.source) : "";
    return el(
      "div",
      { class: "bar" },
      number,
      place,
      el("span", { class: "number" }, facts),
      sources,
      button("diff", "key d", view.diff, () => press("d")),
      button("Markdown", "key m", view.rich, () => press("m")),
      button("tokens", "key t: log-probs", Boolean(view.tokens), () => press("t")),
      button("changed", "key g: what training changed", view.changing, () => press("g")),
      count > 1 ? button(`same prompt (${count})`, "key c", view.same, () => press("c")) : "",
      button("⚑ flag", "key f", view.flags.has(pair.i), () => press("f")),
      note,
    );
  }

  function noteKey(event) {
    if (event.key === "Enter") {
      link.ask({ do: "note", i: view.pair.i, text: event.target.value });
      root.focus();
    } else if (event.key === "Escape") {
      event.target.value = view.notes[view.pair.i] ?? "";
      root.focus();
    }
  }

  function sideOf(pair, name, text) {
    const { chosen, reward, length } = pair[name];
    const verdict = chosen ? "chosen ✓" : "rejected";
    const head = `${name}: ${verdict} · reward ${tell(reward)} · ${whole(length)} characters`;
    const looks = { class: `side ${chosen ? "chosen" : "rejected"}`, "data-side": name };
    return el("div", looks, el("div", { class: "head" }, head), scrolling(text));
  }

  // The chosen answers to one prompt, round by round, each beside what it was before.
  function showSame(history) {
    view.same = true;
    let before = null;
    const step = ({ i, round, margin, text }) => {
      const shown = before == null ? plain(text) : diffed(before, text)[1];
      before = text;
      const title = `pair ${whole(i + 1)}`;
      const head = el("div", { class: "bar" }, dot(roundColor(i)), el("b", {}, round));
      head.append(`margin ${tell(margin, 2)}`, button(title, "to this pair", false, () => jump(i)));
      return el("div", { class: "side step" }, head, shown);
    };
    const said = "Chosen answers to this prompt, in order; what is new in each is marked.";
    const steps = el("div", { class: "steps" }, el("p", {}, said), ...history.map(step));
    detail.replaceChildren(headOf(view.pair), turns(view.pair.prompt), scrolling(steps));
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
    return el("table", { class: "said", "aria-label": "what labellers say" }, ...said.map(row));
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
    const box = [56, 8, WIDTH - 10, HEIGHT - 36];
    return { x, y, xs, ys, rx: range(xs), ry: y && range(ys), box };
  }

  // How many of all pairs, and of those kept, are in each bin.
  function histogram(at) {
    const [all, kept] = [new Uint32Array(BINS), new Uint32Array(BINS)];
    const bin = (x) => Math.min(BINS - 1, Math.floor(along(x, at.rx, 0, BINS)));
    for (const x of at.xs) if (isNumber(x)) all[bin(x)]++;
    for (const i of view.order) if (isNumber(at.xs[i])) kept[bin(at.xs[i])]++;
    return { all, kept, most: Math.max(1, ...all) };
  }

  function drawAxes(c, at, most) {
    const [l, t, r, b] = at.box;
    c.fillStyle = getComputedStyle(root).color;
    c.strokeStyle = GREY;
    c.lineWidth = 1;
    c.strokeRect(l, t, r - l, b - t);
    c.font = "11px sans-serif";
    c.textAlign = "center";
    for (const [value, text] of ticks(at.rx)) {
      const x = along(value, at.rx, l, r);
      line(c, x, b, x, b + 4);
      if (x > l + 8 && x < r - 8) c.fillText(text, x, b + 15);
      if (value === 0 && at.y) line(c, x, t, x, b);
    }
    const ry = at.ry ?? [0, most];
    c.textAlign = "right";
    for (const [value, text] of ticks(ry)) {
      const y = along(value, ry, b, t);
      line(c, l - 4, y, l, y);
      c.fillText(text, l - 6, Math.max(t + 8, y + 4));
      if (value === 0 && at.y) line(c, l, y, r, y);
    }
    c.textAlign = "center";
    c.fillText(AXES[at.x], (l + r) / 2, b + 31);
    c.save();
    c.translate(10, (t + b) / 2);
    c.rotate(-Math.PI / 2);
    c.fillText(at.y ? AXES[at.y] : "pairs", 0, 0);
    c.restore();
  }

  function line(c, x, y, x2, y2) {
    c.beginPath();
    c.moveTo(x, y);
    c.lineTo(x2, y2);
    c.stroke();
  }

  function drawPoints(c, at) {
    const [l, t, r, b] = at.box;
    const many = view.order.length > 2000;
    const points = (indices, size, color, alpha) => {
      c.globalAlpha = alpha;
      for (const i of indices) {
        c.fillStyle = color ?? roundColor(i);
        const x = along(at.xs[i], at.rx, l, r);
        const y = along(at.ys[i], at.ry, b, t);
        c.fillRect(x - size / 2, y - size / 2, size, size);
      }
    };
    if (view.order.length < view.total) points(Array(view.total).keys(), 2, PALE, 0.5);
    points(view.order, many ? 2.5 : 4, null, many ? 0.4 : 0.9);
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
    canvas.width = WIDTH * ratio;
    canvas.height = HEIGHT * ratio;
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
    const [low, high] = RANGES[at.x];
    fields[low].value = edge(bin);
    fields[high].value = edge(bin + 1);
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
    const scale = WIDTH / canvas.clientWidth; // narrower on a narrow page
    if (at.y) goNearest(at, event.offsetX * scale, event.offsetY * scale);
    else filterBar(at, event.offsetX * scale);
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
      [view.changed, view.changing] = [null, false];
      show();
    } else if (key === "m") {
      view.rich = !view.rich;
      show();
    } else if (key === "t" && view.pair) {
      if (!view.tokens) link.ask({ do: "tokens", i: view.pair.i });
      [view.tokens, view.changed, view.changing, view.diff] = [null, null, false, false];
      show();
    } else if (key === "g" && view.pair) {
      toggleChanged();
    } else if (key === "c" && view.pair) {
      if (view.same) show();
      else link.ask({ do: "same", i: view.pair.i });
      view.same = false;
    } else if (key === "n" && view.pair) {
      detail.querySelector("input.note").focus();
    } else if (key === " " || key === "PageDown") {
      scrollBoxes(detail, 0.8);
    } else if (key === "b" || key === "PageUp") {
      scrollBoxes(detail, -0.8);
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
    label("length difference", fields.less, "to", fields.more),
    fields.part,
    label("", fields.wrong, "score against label"),
    label("", fields.disputed, "labellers disagree"),
    label("", fields.flagged, "flagged"),
    label("", fields.noted, "noted"),
    el("button", { onclick: clear }, "clear"),
    label("sort", fields.sort),
    label("", fields.down, "largest first"),
    fields.mark,
    label("pair", fields.jump),
  );
  const exported = {
    class: "export",
    onclick: () => link.ask({ do: "export" }),
    title: "write the pairs kept as a feedback file",
  };
  const kept = bar(count, el("button", exported, "export these"));
  const overview = el("div", { class: "overview" }, fields.picture, canvas, legend);
  overview.append(kept, list, pager);
  const keys = el(
    "div",
    {},
    ...hint("j", ""),
    ...hint("k", "next, before"),
    ...hint("space", ""),
    ...hint("b", "scroll"),
    ...hint("d", "diff"),
    ...hint("m", "Markdown"),
    ...hint("t", "tokens"),
    ...hint("g", "changed by training"),
    ...hint("c", "same prompt"),
    ...hint("f", "flag"),
    ...hint("n", "note"),
    ...hint("/", "search"),
  );
  const browser = el("div", { class: "browser" }, overview, detail);
  const root = frame(filters, browser, el("div", { class: "foot" }, keys, status));
  root.classList.add("pairs");
  host.classList.add("hnb-host");
  for (const field of root.querySelectorAll("input")) {
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape" || event.key === "Enter") root.focus();
    });
  }
  onKeys(root, press);
  host.append(root);
  link.ask({ do: "open" });
  // the picture is drawn in the colours of the page; these change with its theme
  const redraw = new MutationObserver(() => setTimeout(draw, 200));
  redraw.observe(document.body, { attributeFilter: ["data-jp-theme-name"] });
  return () => redraw.disconnect();
}

export default { render };
