// Shared by the widgets. Text of models and people reaches the page as text nodes only; no HTML
// is ever made of it.

// An element; attributes that begin with "on" are listeners, children that are strings text.
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

// The widget's outermost element: it takes the keyboard, so that JupyterLab's own keys (b: new
// cell) stay out of it.
function frame(...children) {
  const focus = { tabindex: "0", "data-lm-suppress-shortcuts": "true" };
  const root = el("div", { class: "hnb", ...focus }, ...children);
  root.addEventListener("keydown", (e) => e.stopPropagation());
  return root;
}

// A box that scrolls, with a sign of what lies below as long as there is something.
function scrolling(box) {
  const sign = el("button", { class: "more", tabindex: "-1", hidden: true }, "↓ more below");
  const outer = el("div", { class: "scrolling" }, box, sign);
  const look = () => {
    sign.hidden = box.scrollHeight - box.scrollTop - box.clientHeight < 6;
  };
  sign.addEventListener("click", () => box.scrollBy(0, box.clientHeight - 40));
  box.addEventListener("scroll", look);
  new ResizeObserver(look).observe(box);
  requestAnimationFrame(look);
  return outer;
}

// Scrolls the boxes of a part of the page together, by a share of what is seen of each.
function scrollBoxes(part, share) {
  for (const box of part.querySelectorAll(".scrolling > *:first-child")) {
    box.scrollBy(0, share * box.clientHeight);
  }
}

// Whether a key is meant for something other than the widget: a field in it, or the browser.
function meantForOthers(event) {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey) return true;
  if (event.repeat || event.isComposing) return true;
  if (target.matches("input, textarea, select")) return true;
  return ["Enter", " "].includes(event.key) && target.matches("button, summary");
}

// Calls press(key) for keys that are meant for the widget; press says whether it took one.
function onKeys(root, press) {
  root.addEventListener("keydown", (event) => {
    if (!meantForOthers(event) && press(event.key)) event.preventDefault();
  });
}

const UNHEARD =
  "The kernel does not answer: it is busy with another cell, or gone. What was pressed last " +
  "counts only when this line goes away; if it stays, run this cell again.";

// Sends messages to the kernel and hands its replies to receive; says so while no reply comes.
// `waiting` until there is one.
function connect(model, status, receive) {
  const link = { waiting: false };
  let late;

  function say(text, wrong) {
    const looks = { class: wrong ? "wrong" : "", role: wrong ? "alert" : "status" };
    status.replaceChildren(text ? el("span", looks, text) : "");
  }
  const unheard = () => say(UNHEARD, true);

  model.on("msg:custom", (message, buffers) => {
    clearTimeout(late);
    link.waiting = false;
    say(message.error ?? message.said ?? "", "error" in message);
    receive(message, buffers);
  });

  // busy: what is said while the answer takes its time; else silence is told after a while
  link.ask = (message, busy = "") => {
    clearTimeout(late);
    if (busy) say(busy);
    else late = setTimeout(unheard, 4000);
    link.waiting = true;
    try {
      model.send(message);
    } catch {
      unheard(); // the kernel was started again without us
    }
  };
  return link;
}

// ---- texts and their differences

// Words, spaces and signs of a text, one by one.
const words = (text) => text.match(/\p{L}[\p{L}\p{M}\p{N}'’]*|\p{N}+|\s+|[^]/gu) ?? [];

// Lengths of the longest common subsequences of all pairs of ends of two lists, row by row.
function commonLengths(x, y) {
  const columns = y.length + 1;
  const longest = new Uint16Array((x.length + 1) * columns);
  for (let i = x.length - 1; i >= 0; i--) {
    for (let j = y.length - 1; j >= 0; j--) {
      const below = longest[(i + 1) * columns + j];
      const beside = longest[i * columns + j + 1];
      const both = longest[(i + 1) * columns + j + 1] + 1;
      longest[i * columns + j] = x[i] === y[j] ? both : Math.max(below, beside);
    }
  }
  return longest;
}

// What each side has and the other has not: two lists of [part, is it new]; null if the texts
// are too long.
function diff(a, b) {
  const x = words(a);
  const y = words(b);
  let start = 0; // what both begin with, and what both end with, need not be compared
  while (start < x.length && start < y.length && x[start] === y[start]) start++;
  let [m, n] = [x.length, y.length];
  while (m > start && n > start && x[m - 1] === y[n - 1]) {
    m--;
    n--;
  }
  const [left, right] = [x.slice(start, m), y.slice(start, n)];
  if ((left.length + 1) * (right.length + 1) > 9e6) return null;

  const longest = commonLengths(left, right);
  const at = (i, j) => longest[i * (right.length + 1) + j];
  const old = (list) => list.map((word) => [word, false]);
  const sides = [old(x.slice(0, start)), old(y.slice(0, start))];
  let [i, j] = [0, 0];
  while (i < left.length || j < right.length) {
    const bothLeft = i < left.length && j < right.length;
    if (bothLeft && left[i] === right[j]) {
      sides[0].push([left[i++], false]);
      sides[1].push([right[j++], false]);
    } else if (j === right.length || (bothLeft && at(i + 1, j) >= at(i, j + 1))) {
      sides[0].push([left[i++], true]);
    } else {
      sides[1].push([right[j++], true]);
    }
  }
  sides[0].push(...old(x.slice(m)));
  sides[1].push(...old(y.slice(n)));
  return sides;
}

// The two texts side by side with their differences marked.
function diffed(a, b) {
  const sides = diff(a, b);
  if (!sides) return [plain(a + "\n\n(too long to compare word by word)"), plain(b)];
  return sides.map((parts, side) => {
    const box = el("pre", { class: "text", dir: "auto" });
    const whole = side ? b : a;
    if (!whole.trim()) box.append(nothing(whole));
    for (let k = 0; k < parts.length;) {
      const marked = parts[k][1];
      let text = "";
      while (k < parts.length && parts[k][1] === marked) text += parts[k++][0];
      box.append(marked ? el(side ? "ins" : "del", {}, text) : text);
    }
    return box;
  });
}

const CHUNK = 4000; // letters
const LONG_TEXT = 20_000;

// A long text in pieces, cut at line ends, else at spaces; the page lays out those in view only.
function pieces(text) {
  const found = [];
  let start = 0;
  while (start < text.length) {
    let end = start + CHUNK;
    if (end < text.length) {
      const at = Math.max(text.lastIndexOf("\n", end), text.lastIndexOf(" ", end));
      end = at > start ? at + 1 : end;
    }
    found.push(text.slice(start, end));
    start = end;
  }
  return found;
}

// Fills a box with a text; what matches the pattern is marked (the first 2,000 places).
function fill(box, text, pattern) {
  let [end, marks] = [0, 0];
  for (const match of pattern ? text.matchAll(pattern) : []) {
    if (!match[0] || marks++ >= 2000) continue;
    box.append(text.slice(end, match.index), el("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  box.append(text.slice(end));
  return box;
}

// What stands where there is nothing to see: no text at all, or blanks and line ends alone.
function nothing(text) {
  const what = text ? `only white space, ${text.length.toLocaleString("en")} characters` : "empty";
  return el("span", { class: "nothing" }, `(${what})`);
}

// A text as it is.
function plain(text, pattern) {
  const box = el("pre", { class: "text", dir: "auto" });
  if (!text.trim()) box.append(nothing(text));
  if (text.length < LONG_TEXT) return fill(box, text, pattern);
  box.append(...pieces(text).map((piece) => fill(el("div", { class: "piece" }), piece, pattern)));
  return box;
}

// A conversation: each turn under its role, where there are several.
function turns(prompt, pattern) {
  const several = prompt.length > 1;
  const role = (turn) => (several ? el("span", { class: "role" }, turn.role) : "");
  const shown = prompt.map((turn) => el("div", {}, role(turn), plain(turn.content, pattern)));
  return el("div", { class: "prompt" }, ...shown);
}

