// HumanLabeler: one blind pair and its keys. The next pair appears when the last answer is on disk.
const KEYS = { 1: ["left", "left is better"], 2: ["right", "right is better"], 3: ["tie", "equally good"], 4: ["bad", "both bad"], 0: ["skip", "skip"] };
const ORDER = ["1", "2", "3", "4", "0"];

function render({ model, el: host }) {
  const view = { item: null, diff: false, noting: false, shown: 0, hidden: 0, since: 0 };
  const [status, bar, body, note] = [el("div", { class: "status" }), el("div", { class: "bar" }), el("div", {}), el("div", {})];
  const buttons = ORDER.map((key) => [key, ...KEYS[key]]).map(([key, value, text]) => el("button", { "data-value": value, "aria-label": `${text}, key ${key}`, onclick: () => { press(key); root.focus(); } }, el("kbd", {}, key), " ", text));
  const guidelines = el("details", { class: "guidelines", open: true });
  const link = connect(model, status, receive);

  document.addEventListener("visibilitychange", hidden); // the time a pair is looked at does not include other windows
  function hidden() { if (document.hidden) view.since = performance.now(); else if (view.since) { view.hidden += performance.now() - view.since; view.since = 0; } }

  function receive(message) {
    if (message.error) return;
    if (message.guidelines) guidelines.replaceChildren(el("summary", {}, "Guidelines"), message.guidelines);
    if (message.item?.name !== view.item?.name) [view.noting, view.diff] = [false, false];
    [view.item, view.shown, view.hidden] = [message.item, performance.now(), 0];
    [view.position, view.total, view.answered] = [message.position, message.total, message.answered];
    bar.replaceChildren(el("b", { class: "number" }, `${message.answered} of ${message.total}`), el("progress", { value: message.answered, max: message.total, "aria-label": "answered" }), el("span", { class: "number" }, message.speed));
    show(message);
  }

  function show(message = {}) {
    const item = view.item;
    for (const b of buttons) { b.disabled = !item; b.setAttribute("aria-pressed", String(item?.answer === b.dataset.value)); }
    root.dataset.item = item?.name ?? "";
    note.replaceChildren();
    if (!item) return body.replaceChildren(el("p", {}, el("b", {}, "All pairs are answered. "), "The arrows lead back to them; u takes the last answer back."), message.report ? el("table", { class: "said" }, ...message.report.map(([k, v]) => el("tr", {}, el("th", {}, k), el("td", {}, v)))) : "");
    const [left, right] = view.diff ? diffed(item.left, item.right) : [plain(item.left), plain(item.right)];
    const side = (name, text) => el("div", { class: "side", "data-side": name }, el("div", { class: "head" }, name), text);
    body.replaceChildren(el("div", {}, `pair ${view.position + 1}${item.answer ? ", answered: " + Object.values(KEYS).find(([v]) => v === item.answer)[1] : ""}`), turns(item.prompt), el("div", { class: "two" }, side("left", left), side("right", right)));
    if (view.noting) {
      const area = el("textarea", { rows: "2", style: "width: 100%", "aria-label": "note on this pair" });
      area.value = item.note;
      const save = () => { view.noting = false; link.ask({ do: "note", item: item.name, text: area.value }); root.focus(); };
      area.addEventListener("keydown", (e) => { if (e.key === "Escape") { view.noting = false; show(); root.focus(); } else if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); save(); } });
      note.replaceChildren(el("label", {}, "note (Enter saves, Escape leaves it as it was)"), area);
      area.focus();
    } else if (item.note) note.replaceChildren(el("div", {}, "note: ", item.note));
  }

  function press(key) {
    if (!(key in KEYS || ["u", "n", "d", "ArrowLeft", "ArrowRight"].includes(key))) return false;
    if (link.waiting) return true; // a key counts for the pair that is on the screen; until the next one is, for nothing
    if (key in KEYS && view.item) link.ask({ do: "choose", item: view.item.name, value: KEYS[key][0], seconds: (performance.now() - view.shown - view.hidden) / 1000 });
    else if (key === "u") link.ask({ do: "undo" });
    else if (key === "n" && view.item) { view.noting = true; show(); }
    else if (key === "d" && view.item) { view.diff = !view.diff; show(); }
    else if (key === "ArrowLeft" || key === "ArrowRight") link.ask({ do: "look", position: view.position + (key === "ArrowLeft" ? -1 : 1) });
    return true;
  }

  const hint = (key, text) => [el("kbd", {}, key), ` ${text} `];
  const root = frame(guidelines, bar, status, body, el("div", { class: "bar", style: "margin: 10px 0" }, ...buttons), note,
    el("div", {}, ...hint("u", "undo"), ...hint("n", "note"), ...hint("d", "word diff"), ...hint("←", ""), ...hint("→", "look at others"), "· every key is saved at once ", el("span", { class: "unfocused", role: "note" }, "Click here to label with the keyboard.")));
  onKeys(root, press);
  host.append(root);
  link.ask({ do: "open" });
  return () => document.removeEventListener("visibilitychange", hidden);
}

export default { render };
