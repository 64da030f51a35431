// Shared by the widgets. Text of models and people reaches the page as text nodes only; no HTML is ever made of it.

// An element; attributes that begin with "on" are listeners, children that are strings become text.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// The widget's outermost element: it takes the keyboard, so that JupyterLab's own keys (b: new cell) stay out of it.
function frame(...children) {
  const root = el("div", { class: "hnb", tabindex: "0", "data-lm-suppress-shortcuts": "true" }, ...children);
  root.addEventListener("keydown", (e) => e.stopPropagation());
  return root;
}

// Calls press(key) for keys that are meant for the widget, not for a field in it or the browser.
function onKeys(root, press) {
  root.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.repeat || e.isComposing || e.target.matches("input, textarea, select")) return;
    if (["Enter", " "].includes(e.key) && e.target.matches("button, summary")) return;
    if (press(e.key)) e.preventDefault();
  });
}

// Sends messages to the kernel and hands its replies to receive; says so while no reply comes. `waiting` until there is one.
function connect(model, status, receive) {
  const link = { waiting: false };
  let late;
  const say = (text, wrong) => status.replaceChildren(text ? el("span", { class: wrong ? "wrong" : "", role: wrong ? "alert" : "status" }, text) : "");
  const unheard = () => say("The kernel does not answer: it is busy with another cell, or gone. What was pressed last counts only when this line goes away; if it stays, run this cell again.", true);
  model.on("msg:custom", (message, buffers) => {
    clearTimeout(late);
    link.waiting = false;
    say(message.error ?? message.said ?? "", "error" in message);
    receive(message, buffers);
  });
  link.ask = (message) => {
    clearTimeout(late);
    late = setTimeout(unheard, 4000);
    link.waiting = true;
    try { model.send(message); } catch { unheard(); } // the kernel was started again without us
  };
  return link;
}

// Words, spaces and signs of a text, one by one.
const words = (text) => text.match(/\p{L}[\p{L}\p{M}\p{N}'’]*|\p{N}+|\s+|[^]/gu) ?? [];

// What each side has and the other has not: two lists of [part, is it new]; null if the texts are too long.
function diff(a, b) {
  let [x, y, start] = [words(a), words(b), 0];
  while (start < x.length && start < y.length && x[start] === y[start]) start++;
  let [m, n] = [x.length, y.length];
  while (m > start && n > start && x[m - 1] === y[n - 1]) { m--; n--; }
  const [rows, columns] = [m - start + 1, n - start + 1];
  if (rows * columns > 9e6) return null;
  const longest = new Uint16Array(rows * columns); // of a common subsequence of the rests
  for (let i = rows - 2; i >= 0; i--)
    for (let j = columns - 2; j >= 0; j--)
      longest[i * columns + j] = x[start + i] === y[start + j] ? longest[(i + 1) * columns + j + 1] + 1 : Math.max(longest[(i + 1) * columns + j], longest[i * columns + j + 1]);
  const [left, right] = [x.slice(0, start).map((w) => [w, false]), y.slice(0, start).map((w) => [w, false])];
  let [i, j] = [0, 0];
  while (i < rows - 1 || j < columns - 1) {
    if (i < rows - 1 && j < columns - 1 && x[start + i] === y[start + j]) { left.push([x[start + i++], false]); right.push([y[start + j++], false]); }
    else if (j === columns - 1 || (i < rows - 1 && longest[(i + 1) * columns + j] >= longest[i * columns + j + 1])) left.push([x[start + i++], true]);
    else right.push([y[start + j++], true]);
  }
  for (const w of x.slice(m)) { left.push([w, false]); right.push([w, false]); }
  return [left, right];
}

// The two texts side by side with their differences marked.
function diffed(a, b) {
  const sides = diff(a, b);
  if (!sides) return [plain(a + "\n\n(too long to compare word by word)"), plain(b)];
  return sides.map((parts, side) => {
    const box = plain("");
    for (let k = 0; k < parts.length;) {
      let [text, marked] = ["", parts[k][1]];
      while (k < parts.length && parts[k][1] === marked) text += parts[k++][0];
      box.append(marked ? el(side ? "ins" : "del", {}, text) : text);
    }
    return box;
  });
}

// A text as it is; what matches the pattern is marked (the first 2,000 places).
function plain(text, pattern) {
  const box = el("pre", { class: "text", dir: "auto" });
  let [end, marks] = [0, 0];
  for (const match of pattern ? text.matchAll(pattern) : []) {
    if (!match[0] || marks++ >= 2000) continue;
    box.append(text.slice(end, match.index), el("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  box.append(text.slice(end));
  return box;
}

// A conversation: each turn under its role, where there are several.
const turns = (prompt, pattern) => el("div", { class: "prompt" }, ...prompt.map((t) => el("div", {}, prompt.length > 1 ? el("span", { class: "role" }, t.role) : "", plain(t.content, pattern))));
