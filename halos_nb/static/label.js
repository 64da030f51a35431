// HumanLabeler: one blind pair and its keys. The next pair appears when the last answer is on
// disk.
const CHOICES = {
  1: ["left", "left is better"],
  2: ["right", "right is better"],
  3: ["tie", "equally good"],
  4: ["bad", "both bad"],
  0: ["skip", "skip"],
};
const ORDER = ["1", "2", "3", "4", "0"];
const SCROLLS = { " ": 0.8, PageDown: 0.8, ArrowDown: 0.25, b: -0.8, PageUp: -0.8, ArrowUp: -0.25 };
const OTHER_KEYS = ["u", "n", "d", "m", "g", "ArrowLeft", "ArrowRight"];
const choiceText = (value) => Object.values(CHOICES).find(([v]) => v === value)[1];
const STAYS = 5000; // milliseconds

// Measures how long the page is looked at; time in other windows does not count.
function stopwatch() {
  let [start, away, left] = [0, 0, 0];
  function visibility() {
    if (document.hidden) {
      left = performance.now();
    } else if (left) {
      away += performance.now() - left;
      left = 0;
    }
  }
  document.addEventListener("visibilitychange", visibility);
  return {
    restart: () => ([start, away] = [performance.now(), 0]),
    seconds: () => (performance.now() - start - away) / 1000,
    end: () => document.removeEventListener("visibilitychange", visibility),
  };
}

const typesElsewhere = (root) => {
  const active = document.activeElement;
  const editor = active?.matches("input, textarea, select, [contenteditable=true]");
  return editor && !root.contains(active);
};

// After Run All the page stands at the last cell. The box comes into view, and the keyboard goes
// to it, as long as the reader does nothing else and types nowhere.
function stayInView(root) {
  const kinds = ["pointerdown", "keydown", "wheel"];
  const until = performance.now() + STAYS;
  const end = () => {
    clearInterval(timer);
    for (const kind of kinds) document.removeEventListener(kind, end, true);
  };
  const timer = setInterval(() => {
    if (!root.isConnected || performance.now() > until || typesElsewhere(root)) return end();
    const { top, bottom, height } = root.getBoundingClientRect();
    if (!height) return;
    // its keys are at its lower end; below it is JupyterLab's own line
    if (top < 0 || bottom > window.innerHeight - 30) root.scrollIntoView({ block: "start" });
    root.focus({ preventScroll: true });
  }, 200);
  for (const kind of kinds) document.addEventListener(kind, end, true);
  return end;
}

function render({ model, el: host }) {
  const view = { item: null, position: 0, diff: false, rich: true, then: "", result: null };
  const watch = stopwatch();
  const status = el("div", { class: "status" });
  const bar = el("div", { class: "bar" });
  const counts = el("div", { class: "counts number" });
  const body = el("div", { class: "body" });
  const guidelines = el("aside", { class: "guidelines", hidden: true });
  const buttons = ORDER.map(choiceButton);
  const note = el("input", {
    class: "note",
    size: "24",
    placeholder: "note (n; Enter saves)",
    "aria-label": "note on this pair",
    onkeydown: noteKey,
  });
  const go = el("button", { class: "go", hidden: true, onclick: carryOn });
  const link = connect(model, status, receive);

  function choiceButton(key) {
    const [value, text] = CHOICES[key];
    const named = { "data-value": value, "aria-label": `${text}, key ${key}` };
    const click = () => {
      press(key);
      root.focus();
    };
    return el("button", { ...named, onclick: click }, el("kbd", {}, key), " ", text);
  }

  function receive(message) {
    if (message.error) {
      go.disabled = false;
      return;
    }
    if (message.guidelines && !guidelines.childElementCount) {
      const close = el("button", { onclick: () => press("g"), "aria-label": "fold" }, "×");
      const head = el("div", { class: "head bar" }, "Guidelines", close);
      guidelines.replaceChildren(head, markdown(message.guidelines));
      guidelines.hidden = false;
      root.classList.add("guided");
    }
    if (message.item?.name !== view.item?.name) {
      view.diff = false;
      view.drawn = "";
    }
    view.item = message.item;
    view.position = message.position;
    view.then = message.then;
    if (message.result) view.result = message.result;
    watch.restart();
    showProgress(message);
    show(message.report);
  }

  function showProgress({ answered, total, speed, pairs }) {
    bar.replaceChildren(
      el("b", { class: "number" }, `${answered} of ${total}`),
      el("progress", { value: answered, max: total, "aria-label": "answered" }),
      el("span", { class: "number" }, speed),
    );
    counts.textContent = pairs;
  }

  function show(report) {
    const item = view.item;
    for (const button of buttons) {
      button.disabled = !item;
      button.setAttribute("aria-pressed", String(item?.answer === button.dataset.value));
    }
    root.dataset.item = item?.name ?? "";
    note.disabled = !item;
    note.value = item?.note ?? "";
    go.hidden = Boolean(item) || !view.then;
    go.disabled = false;
    go.replaceChildren(el("kbd", {}, "Enter"), ` ${view.then}`);
    if (!item) return showReport(report);
    showPair(item);
  }

  function tableOf(rows, tag = "th") {
    const row = ([name, ...values]) =>
      el("tr", {}, el(tag, {}, name), ...values.map((value) => el("td", {}, value)));
    return el("table", { class: "said" }, ...rows.map(row));
  }

  function showReport(report) {
    const hint = "The arrows lead back to them; u takes the last answer back.";
    const found = view.result;
    const result = found
      ? el("div", { class: "result" }, el("b", {}, found.title), tableOf(found.rows))
      : "";
    const text = el("p", {}, el("b", {}, "All pairs are answered. "), hint);
    const all = el("div", { class: "text" }, result, text, report ? tableOf(report) : "");
    body.replaceChildren(scrolling(all));
    body.classList.add("whole");
  }

  function showPair(item) {
    const way = view.rich ? markdown : (text) => plain(text);
    const texts = view.diff
      ? diffed(item.left, item.right)
      : [way(item.left), way(item.right)];
    const side = (name, text) => {
      const head = el("div", { class: "head" }, name);
      return el("div", { class: "side", "data-side": name }, head, scrolling(text));
    };
    const answered = item.answer ? `, answered: ${choiceText(item.answer)}` : "";
    body.classList.remove("whole");
    body.replaceChildren(
      el("div", {}, `pair ${view.position + 1}${answered}`),
      scrolling(turns(item.prompt)),
      el("div", { class: "two" }, side("left", texts[0]), side("right", texts[1])),
    );
  }

  function noteKey(event) {
    if (event.key === "Escape") {
      note.value = view.item.note;
      root.focus();
    } else if (event.key === "Enter") {
      link.ask({ do: "note", item: view.item.name, text: note.value });
      root.focus();
    }
  }

  function choose(value) {
    link.ask({ do: "choose", item: view.item.name, value, seconds: watch.seconds() });
  }

  // Feed, train, compare: takes as long as a training does.
  function carryOn() {
    if (go.hidden || go.disabled) return;
    go.disabled = true;
    link.ask({ do: "continue" }, `${view.then} …`);
    root.focus();
  }

  // A key; whether it was one of ours.
  function press(key) {
    if (key in SCROLLS) {
      scrollBoxes(body, SCROLLS[key]);
      return true;
    }
    if (key === "Enter" && !go.hidden) {
      carryOn();
      return true;
    }
    if (!(key in CHOICES || OTHER_KEYS.includes(key))) return false;
    // a key counts for the pair that is on the screen; until the next one is, for nothing
    if (link.waiting) return true;
    if (key === "u") link.ask({ do: "undo" });
    else if (key === "ArrowLeft") link.ask({ do: "look", position: view.position - 1 });
    else if (key === "ArrowRight") link.ask({ do: "look", position: view.position + 1 });
    else if (key === "g") {
      guidelines.hidden = !guidelines.hidden || !guidelines.childElementCount;
      root.classList.toggle("guided", !guidelines.hidden);
    } else if (!view.item) return true;
    else if (key in CHOICES) choose(CHOICES[key][0]);
    else if (key === "n") note.focus();
    else {
      if (key === "d") view.diff = !view.diff;
      else view.rich = !view.rich;
      showPair(view.item);
    }
    return true;
  }

  const hint = (key, text) => [el("kbd", {}, key), ` ${text} `];
  const unfocused = { class: "unfocused", role: "note" };
  const keys = el(
    "div",
    {},
    ...hint("u", "undo"),
    ...hint("n", "note"),
    ...hint("d", "word diff"),
    ...hint("m", "Markdown or raw"),
    ...hint("space", ""),
    ...hint("b", "scroll"),
    ...hint("←", ""),
    ...hint("→", "others"),
    ...hint("g", "guidelines"),
    "· saved at every key ",
  );
  const click = el("div", unfocused, "Click here to label with the keyboard.");
  const choices = el("div", { class: "bar choices" }, ...buttons, go, note);
  const work = el("div", { class: "work" }, body, guidelines);
  const foot = el("div", { class: "foot" }, keys, counts, status);
  const root = frame(click, bar, work, choices, foot);
  root.classList.add("label");
  host.classList.add("hnb-host");
  onKeys(root, press);
  host.append(root);
  link.ask({ do: "open" });
  const endStay = stayInView(root);
  return () => {
    watch.end();
    endStay();
  };
}

export default { render };
