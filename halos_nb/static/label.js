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
const OTHER_KEYS = ["u", "n", "d", "ArrowLeft", "ArrowRight"];
const choiceText = (value) => Object.values(CHOICES).find(([v]) => v === value)[1];

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

function render({ model, el: host }) {
  const view = { item: null, position: 0, diff: false, noting: false };
  const watch = stopwatch();
  const status = el("div", { class: "status" });
  const bar = el("div", { class: "bar" });
  const body = el("div", {});
  const note = el("div", {});
  const guidelines = el("details", { class: "guidelines", open: true });
  const buttons = ORDER.map(choiceButton);
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
    if (message.error) return;
    if (message.guidelines) {
      guidelines.replaceChildren(el("summary", {}, "Guidelines"), message.guidelines);
    }
    if (message.item?.name !== view.item?.name) {
      view.noting = false;
      view.diff = false;
    }
    view.item = message.item;
    view.position = message.position;
    watch.restart();
    showProgress(message);
    show(message.report);
  }

  function showProgress({ answered, total, speed }) {
    bar.replaceChildren(
      el("b", { class: "number" }, `${answered} of ${total}`),
      el("progress", { value: answered, max: total, "aria-label": "answered" }),
      el("span", { class: "number" }, speed),
    );
  }

  function show(report) {
    const item = view.item;
    for (const button of buttons) {
      button.disabled = !item;
      button.setAttribute("aria-pressed", String(item?.answer === button.dataset.value));
    }
    root.dataset.item = item?.name ?? "";
    note.replaceChildren();
    if (!item) return showReport(report);
    showPair(item);
    if (view.noting) editNote(item);
    else if (item.note) note.replaceChildren(el("div", {}, "note: ", item.note));
  }

  function showReport(report) {
    const hint = "The arrows lead back to them; u takes the last answer back.";
    const row = ([name, value]) => el("tr", {}, el("th", {}, name), el("td", {}, value));
    body.replaceChildren(
      el("p", {}, el("b", {}, "All pairs are answered. "), hint),
      report ? el("table", { class: "said" }, ...report.map(row)) : "",
    );
  }

  function showPair(item) {
    const texts = view.diff
      ? diffed(item.left, item.right)
      : [plain(item.left), plain(item.right)];
    const side = (name, text) =>
      el("div", { class: "side", "data-side": name }, el("div", { class: "head" }, name), text);
    const answered = item.answer ? `, answered: ${choiceText(item.answer)}` : "";
    body.replaceChildren(
      el("div", {}, `pair ${view.position + 1}${answered}`),
      turns(item.prompt),
      el("div", { class: "two" }, side("left", texts[0]), side("right", texts[1])),
    );
  }

  function editNote(item) {
    const looks = { rows: "2", style: "width: 100%", "aria-label": "note on this pair" };
    const area = el("textarea", looks);
    area.value = item.note;
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        view.noting = false;
        show();
        root.focus();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        view.noting = false;
        link.ask({ do: "note", item: item.name, text: area.value });
        root.focus();
      }
    });
    const label = el("label", {}, "note (Enter saves, Escape leaves it as it was)");
    note.replaceChildren(label, area);
    area.focus();
  }

  function choose(value) {
    link.ask({ do: "choose", item: view.item.name, value, seconds: watch.seconds() });
  }

  // A key; whether it was one of ours.
  function press(key) {
    if (!(key in CHOICES || OTHER_KEYS.includes(key))) return false;
    // a key counts for the pair that is on the screen; until the next one is, for nothing
    if (link.waiting) return true;
    if (key === "u") link.ask({ do: "undo" });
    else if (key === "ArrowLeft") link.ask({ do: "look", position: view.position - 1 });
    else if (key === "ArrowRight") link.ask({ do: "look", position: view.position + 1 });
    else if (!view.item) return true;
    else if (key in CHOICES) choose(CHOICES[key][0]);
    else {
      if (key === "n") view.noting = true;
      else view.diff = !view.diff;
      show();
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
    ...hint("←", ""),
    ...hint("→", "look at others"),
    "· every key is saved at once ",
    el("span", unfocused, "Click here to label with the keyboard."),
  );
  const choices = el("div", { class: "bar", style: "margin: 10px 0" }, ...buttons);
  const root = frame(guidelines, bar, status, body, choices, note, keys);
  onKeys(root, press);
  host.append(root);
  link.ask({ do: "open" });
  return watch.end;
}

export default { render };
