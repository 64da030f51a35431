// PairBrowser: filters, a picture, a list, and one pair at a time. The kernel sends numbers of all pairs once, texts of one page at a time.
const PAGE = 25;
const PICTURES = {
  "margin and length": ["margin", "length"], "scores": ["rejected", "chosen"], "margins": ["margin"], "lengths": ["length"],
};
const AXES = { margin: "margin (chosen - rejected)", length: "length difference (characters)", chosen: "score of chosen", rejected: "score of rejected" };
const SORTS = { "": "as in the file", margin: "margin", near: "distance from a tie", length: "length difference", round: "round", disputed: "disagreement", chosen: "score of chosen", rejected: "score of rejected" };
const tell = (x, digits = 3) => (x == null || Number.isNaN(x) ? "–" : (+x).toFixed(digits));

function render({ model, el: host }) {
  const view = { columns: {}, order: new Int32Array(), place: 0, page: -1, pair: null, diff: false, flags: new Set() };
  const f = fields();
  const canvas = el("canvas", { role: "img", "aria-label": "All pairs; click a point or a bar to see a pair", tabindex: "-1" });
  const [status, count, list, detail] = [el("div", { class: "status" }), el("span", { class: "number" }), el("div", { class: "list", role: "listbox", "aria-label": "Pairs" }), el("div", { class: "detail" })];
  const pager = el("div", { class: "bar" });
  const link = connect(model, status, receive);

  function fields() {
    const number = (name, title, extra = {}) => el("input", { type: "number", step: "any", "aria-label": title, title, name, onchange: filter, ...extra });
    const choice = (name, title, options, onchange) => el("select", { name, "aria-label": title, title, onchange }, ...Object.entries(options).map(([v, t]) => el("option", { value: v }, t)));
    return {
      text: el("input", { type: "search", name: "text", placeholder: "search", "aria-label": "only pairs that contain this text", size: "14", oninput: later(filter) }),
      round: choice("round", "round", { "": "all rounds" }, filter),
      low: number("low", "smallest margin"), high: number("high", "largest margin"), short: number("short", "smallest length difference"), long: number("long", "largest length difference"),
      disputed: el("input", { type: "checkbox", name: "disputed", onchange: filter }), flagged: el("input", { type: "checkbox", name: "flagged", onchange: filter }),
      sort: choice("sort", "sort by", SORTS, filter), down: el("input", { type: "checkbox", name: "down", onchange: filter }),
      mark: el("input", { type: "search", name: "mark", placeholder: "highlight (regex)", "aria-label": "highlight what matches this regular expression", size: "14", oninput: later(() => { view.diff = false; show(); }) }),
      jump: number("jump", "pair number", { min: "1", step: "1", onchange: () => go(view.order.indexOf(f.jump.value - 1), "pair " + f.jump.value + " is not among those kept") }),
      picture: choice("picture", "picture", Object.fromEntries(Object.keys(PICTURES).map((k) => [k, k])), () => draw()),
    };
  }

  function later(run) { // wait until typing pauses
    let timer;
    return () => { clearTimeout(timer); timer = setTimeout(run, 80); };
  }

  function filter() {
    const value = (field) => (field.value === "" ? null : +field.value);
    link.ask({ do: "filter", text: f.text.value, round: f.round.value, margin: [value(f.low), value(f.high)], length: [value(f.short), value(f.long)],
      disputed: f.disputed.checked, flagged: f.flagged.checked, sort: f.sort.value, down: f.down.checked });
  }

  function receive(message, buffers) {
    if (message.columns) {
      message.columns.forEach((name, k) => (view.columns[name] = new Float32Array(buffers[k].buffer, buffers[k].byteOffset, message.total)));
      f.round.append(...message.rounds.map((r) => el("option", { value: r }, r)));
      [view.total, view.flags] = [message.total, new Set(message.flags)];
      filter();
    } else if (message.kept != null) {
      const here = view.pair?.i;
      view.order = new Int32Array(buffers[0].buffer, buffers[0].byteOffset, message.kept);
      [view.page, view.place] = [-1, Math.max(0, view.order.indexOf(here ?? -1))];
      count.textContent = `${message.kept.toLocaleString("en")} of ${view.total.toLocaleString("en")} pairs`;
      root.dataset.kept = message.kept;
      if (message.kept) go(view.place); else { view.pair = null; list.replaceChildren(); pager.replaceChildren(); detail.replaceChildren("No pair is left; loosen a filter."); draw(); }
    } else {
      if (message.flags) view.flags = new Set(message.flags);
      if (message.rows) view.rows = message.rows;
      if (message.rows || message.flags) rows(view.rows);
      if (message.pair) view.pair = message.pair;
      if (message.pair || message.flags) show();
      if (message.pair) draw();
    }
  }

  function go(place, otherwise) { // to a place in the order
    if (place < 0 || place >= view.order.length) { if (otherwise) status.textContent = otherwise; return; }
    const [page, start] = [Math.floor(place / PAGE), Math.floor(place / PAGE) * PAGE];
    view.place = place;
    link.ask({ do: "show", i: view.order[place], rows: page === view.page ? null : Array.from(view.order.slice(start, start + PAGE)) });
    if (page === view.page) mark();
    view.page = page;
  }

  function jump(i) { // to a pair, be it among those kept or not
    const place = view.order.indexOf(i);
    if (place < 0) link.ask({ do: "show", i }); else go(place);
  }

  function rows(shown) {
    list.replaceChildren(...shown.map((r, k) => el("button", { class: "row", role: "option", "data-i": r.i, onclick: () => { go(view.page * PAGE + k); root.focus(); } },
      el("span", {}, (view.flags.has(r.i) ? "⚑ " : "") + tell(r.margin, 2)), el("span", {}, r.text))));
    const last = Math.ceil(view.order.length / PAGE) - 1;
    pager.replaceChildren(el("button", { onclick: () => go((view.page - 1) * PAGE), disabled: view.page === 0, "aria-label": "page before" }, "‹"), `page ${view.page + 1} of ${last + 1}`,
      el("button", { onclick: () => go((view.page + 1) * PAGE), disabled: view.page === last, "aria-label": "next page" }, "›"));
    mark();
  }

  function mark() {
    for (const row of list.children) {
      const here = +row.dataset.i === view.order[view.place];
      row.classList.toggle("here", here);
      row.setAttribute("aria-selected", here);
      if (here) list.scrollTop = Math.max(0, row.offsetTop - list.offsetTop - 160);
    }
  }

  function show() {
    const p = view.pair;
    if (!p) return;
    let pattern = null;
    try { pattern = f.mark.value ? new RegExp(f.mark.value, "giu") : null; f.mark.setCustomValidity(""); } catch (e) { f.mark.setCustomValidity(String(e)); f.mark.reportValidity(); }
    const texts = view.diff ? diffed(p.A.text, p.B.text) : [plain(p.A.text, pattern), plain(p.B.text, pattern)];
    const side = (s, k) => el("div", { class: "side " + (p[s].chosen ? "chosen" : "rejected"), "data-side": s },
      el("div", { class: "head" }, `${s}: ${p[s].chosen ? "chosen ✓" : "rejected"} · reward ${tell(p[s].reward)} · ${p[s].length.toLocaleString("en")} characters`), texts[k]);
    const button = (text, title, pressed, onclick) => el("button", { title, "aria-pressed": String(pressed), onclick: () => { onclick(); root.focus(); } }, text);
    detail.replaceChildren(
      el("div", { class: "bar" }, el("b", {}, `Pair ${p.i + 1}`), `${p.round} · margin ${tell(p.margin)} · length difference ${p.length}`, button("diff", "key d", view.diff, () => press("d")), button("⚑ flag", "key f", view.flags.has(p.i), () => press("f"))),
      turns(p.prompt, pattern), el("div", { class: "two" }, side("A", 0), side("B", 1)),
      p.said.length ? el("table", { class: "said" }, el("caption", {}, "What labellers say"), ...p.said.map((s) => el("tr", {}, el("td", {}, s.labeller), el("td", {}, s.winner === "tie" ? "tie" : s.winner + " is better"), el("td", { class: "number" }, tell(s.margin))))) : "",
      p.same.length > 1 ? el("div", { class: "bar" }, "Same prompt:", ...p.same.map((s) => button(`${s.round}: ${tell(s.margin, 2)}`, `pair ${s.i + 1}`, s.i === p.i, () => jump(s.i))), p.same_total > p.same.length ? `and ${p.same_total - p.same.length} more` : "") : "");
    detail.dataset.i = p.i;
  }

  // ---- the picture

  function axes() {
    const [x, y] = PICTURES[f.picture.value];
    const range = (values) => { let [a, b] = [Infinity, -Infinity]; for (const v of values) if (v === v) { if (v < a) a = v; if (v > b) b = v; } return a > b ? [0, 1] : a === b ? [a - 1, b + 1] : [a, b]; };
    return { x, y, xs: view.columns[x], ys: y && view.columns[y], rx: range(view.columns[x]), ry: y && range(view.columns[y]), box: [52, 10, 290, 182] };
  }
  const along = (v, [a, b], from, to) => from + ((v - a) / (b - a)) * (to - from);

  function bars(at) { // 30 bins: how many of all pairs, how many of those kept
    const [n, all, kept] = [30, new Uint32Array(30), new Uint32Array(30)];
    const bin = (v) => Math.min(n - 1, Math.floor(along(v, at.rx, 0, n)));
    for (const v of at.xs) if (v === v) all[bin(v)]++;
    for (const i of view.order) if (at.xs[i] === at.xs[i]) kept[bin(at.xs[i])]++;
    return { n, all, kept, most: Math.max(1, ...all) };
  }

  function draw() {
    if (!view.columns.margin) return;
    const [ratio, at, c] = [window.devicePixelRatio || 1, axes(), canvas.getContext("2d")], [l, t, r, b] = at.box, ink = getComputedStyle(root).color;
    [canvas.width, canvas.height] = [300 * ratio, 220 * ratio];
    c.scale(ratio, ratio);
    c.fillStyle = ink;
    c.strokeStyle = "#8A9099";
    c.strokeRect(l, t, r - l, b - t);
    c.font = "12px sans-serif";
    const short = (v) => (Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(2));
    c.fillText(short(at.rx[0]), l, b + 14); c.textAlign = "right"; c.fillText(short(at.rx[1]), r, b + 14);
    const top = at.y ? at.ry[1] : bars(at).most;
    c.fillText(short(top), l - 4, t + 10); c.fillText(at.y ? short(at.ry[0]) : "0", l - 4, b);
    c.textAlign = "center"; c.fillText(AXES[at.x], (l + r) / 2, b + 30);
    c.save(); c.translate(14, (t + b) / 2); c.rotate(-Math.PI / 2); c.fillText(at.y ? AXES[at.y] : "pairs", 0, 0); c.restore();
    if (at.y) {
      const dots = (indices, size) => { for (const i of indices) c.fillRect(along(at.xs[i], at.rx, l, r) - size / 2, along(at.ys[i], at.ry, b, t) - size / 2, size, size); };
      c.globalAlpha = 0.5; c.fillStyle = "#C9CED6"; if (view.order.length < view.total) dots(Array(view.total).keys(), 2);
      c.globalAlpha = view.order.length > 2000 ? 0.35 : 0.7; c.fillStyle = "#0072B2"; dots(view.order, view.order.length > 2000 ? 2.5 : 4);
    } else {
      const h = bars(at);
      for (let k = 0; k < h.n; k++) for (const [n, color] of [[h.all[k], "#C9CED6"], [h.kept[k], "#0072B2"]]) { c.fillStyle = color; c.fillRect(l + (k * (r - l)) / h.n, b - (n / h.most) * (b - t), (r - l) / h.n - 1, (n / h.most) * (b - t)); }
    }
    c.globalAlpha = 1;
    if (view.pair && at.xs[view.pair.i] === at.xs[view.pair.i]) {
      c.strokeStyle = "#D55E00"; c.lineWidth = 2; c.beginPath();
      const [x, y] = canvas.place(view.pair.i);
      if (at.y) c.arc(x, y, 6, 0, 7); else { c.moveTo(x, t); c.lineTo(x, b); }
      c.stroke();
    }
  }

  canvas.place = (i) => { const at = axes(), [l, t, r, b] = at.box; return [along(at.xs[i], at.rx, l, r), at.y ? along(at.ys[i], at.ry, b, t) : (t + b) / 2]; };

  canvas.addEventListener("click", (e) => {
    const at = axes(), [l, , r] = at.box, x = e.offsetX;
    root.focus();
    if (!at.y) { // the pairs of a bar
      const k = Math.floor(along(x, [l, r], 0, 30)), edge = (k) => at.rx[0] + (k * (at.rx[1] - at.rx[0])) / 30, round = (v) => +v.toPrecision(6);
      if (k < 0 || k > 29) return;
      const [low, high] = at.x === "margin" ? [f.low, f.high] : [f.short, f.long];
      [low.value, high.value] = [round(edge(k)), round(edge(k + 1))];
      return filter();
    }
    let [best, near] = [-1, 12 ** 2]; // pixels
    view.order.forEach((i, place) => { const [px, py] = canvas.place(i), d = (px - x) ** 2 + (py - e.offsetY) ** 2; if (d < near) [best, near] = [place, d]; });
    go(best, "no pair is near this point");
  });

  // ---- keys

  function press(key) {
    if (key === "j" || key === "ArrowDown" || key === "ArrowRight") go(view.place + 1);
    else if (key === "k" || key === "ArrowUp" || key === "ArrowLeft") go(view.place - 1);
    else if (key === "d") { view.diff = !view.diff; show(); }
    else if (key === "f" && view.pair) link.ask({ do: "flag", i: view.pair.i, on: !view.flags.has(view.pair.i) });
    else if (key === "/") f.text.focus();
    else return false;
    return true;
  }

  const label = (text, ...fields) => el("label", {}, text, ...fields);
  const clear = () => { for (const x of ["text", "round", "low", "high", "short", "long"]) f[x].value = ""; f.disputed.checked = f.flagged.checked = false; filter(); };
  const root = frame(
    el("div", { class: "bar" }, f.text, f.round, label("margin", f.low, "to", f.high), label("length", f.short, "to", f.long), label("", f.disputed, "labellers disagree"), label("", f.flagged, "flagged"), el("button", { onclick: clear }, "clear")),
    el("div", { class: "bar" }, label("sort", f.sort), label("", f.down, "largest first"), f.mark, label("pair", f.jump), count, el("button", { class: "export", onclick: () => link.ask({ do: "export" }), title: "write the pairs kept as a feedback file" }, "export these")),
    status,
    el("div", { class: "browser" }, el("div", {}, label("picture", f.picture), canvas, list, pager), detail),
    el("div", {}, el("kbd", {}, "j"), " next ", el("kbd", {}, "k"), " before ", el("kbd", {}, "d"), " word diff ", el("kbd", {}, "f"), " flag ", el("kbd", {}, "/"), " search"));
  for (const field of root.querySelectorAll("input")) field.addEventListener("keydown", (e) => { if (e.key === "Escape" || e.key === "Enter") root.focus(); });
  onKeys(root, press);
  host.append(root);
  link.ask({ do: "open" });
}

export default { render };
