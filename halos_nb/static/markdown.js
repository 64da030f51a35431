// Markdown as elements. Only the elements made here can come of a text: what is no Markdown, and
// all HTML, stays text. Links and pictures are told, never followed or loaded.
const MARKDOWN_MOST = 60_000; // letters; longer texts are shown as they are
const MARKDOWN_DEPTH = 6; // lists within lists, emphasis within emphasis

const INLINE = new RegExp(
  [
    "`([^`\\n]{1,500})`", // 1: code
    "\\*\\*(?=\\S)([^\\n]{1,500}?\\S)\\*\\*(?!\\*)|\\b__(?=\\S)([^\\n]{1,500}?\\S)__\\b", // 2, 3
    "~~(?=\\S)([^~\\n]{1,500})~~", // 4: struck out
    "\\*(?=[^\\s*])([^*\\n]{0,500}?[^\\s*])\\*|\\b_(?=[^\\s_])([^_\\n]{1,500}?)_\\b", // 5, 6
    "(!?)\\[([^\\]\\n]{0,300})\\]\\(([^)\\s]{1,500})\\)", // 7: picture?, 8: words, 9: where
  ].join("|"),
  "gu",
);

// The parts of a line: texts and elements.
function inlineParts(text, depth = 0) {
  const parts = [];
  let end = 0;
  for (const match of depth < MARKDOWN_DEPTH ? text.matchAll(INLINE) : []) {
    parts.push(text.slice(end, match.index), inlinePart(match, depth));
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  return parts;
}

function inlinePart(match, depth) {
  const [, code, strong, strong2, struck, soft, soft2, picture, words, where] = match;
  if (code) return el("code", {}, code);
  const inner = strong ?? strong2 ?? struck ?? soft ?? soft2;
  if (inner == null) {
    const kind = picture ? "picture: " : "";
    return el("span", { class: "link" }, `${kind}${words || "–"} (${where})`);
  }
  const tag = (strong ?? strong2) ? "strong" : struck ? "s" : "em";
  return el(tag, {}, ...inlineParts(inner, depth + 1));
}

const FENCE = /^ {0,3}(```+|~~~+) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const ITEM = /^( *)(?:([-*+])|(\d{1,9})[.)]) +(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;

const begins = (line) => [FENCE, HEADING, RULE, ITEM, QUOTE].some((kind) => kind.test(line));
const cellsOf = (line) => line.trim().replace(/^\||\|$/g, "").split("|");

// Each of these takes lines from `at` on: the element, and the line behind it; null: not mine.
function fenced(lines, at) {
  const match = lines[at].match(FENCE);
  if (!match) return null;
  let end = at + 1;
  const mark = match[1];
  while (end < lines.length && !lines[end].trimStart().startsWith(mark)) end++;
  return [el("pre", { class: "code" }, lines.slice(at + 1, end).join("\n")), end + 1];
}

function headed(lines, at) {
  const match = lines[at].match(HEADING);
  if (!match) return null;
  const looks = { class: "heading", role: "heading", "aria-level": match[1].length };
  return [el("div", looks, ...inlineParts(match[2])), at + 1];
}

function ruled(lines, at) {
  return RULE.test(lines[at]) ? [el("hr"), at + 1] : null;
}

function quoted(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.match(QUOTE)[1]);
  return [el("blockquote", {}, ...blocks(inner, depth + 1)), end];
}

function tabled(lines, at) {
  const head = lines[at].includes("|") && TABLE_LINE.test(lines[at + 1] ?? "");
  if (!head) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end++;
  const row = (tag) => (line) =>
    el("tr", {}, ...cellsOf(line).map((cell) => el(tag, {}, ...inlineParts(cell.trim()))));
  const body = lines.slice(at + 2, end).map(row("td"));
  return [el("table", { class: "said" }, row("th")(lines[at]), ...body), end];
}

// Items of one list; what is indented below an item is the item's.
function listed(lines, at, depth) {
  const first = lines[at].match(ITEM);
  if (!first || first[1].length > 3) return null;
  const ordered = Boolean(first[3]);
  const list = el(ordered ? "ol" : "ul", ordered ? { start: first[3] } : {});
  let end = at;
  while (end < lines.length) {
    const match = lines[end].match(ITEM);
    if (!match || match[1].length > 3 || Boolean(match[3]) !== ordered) break;
    const inner = [match[4]];
    end++;
    while (end < lines.length && (/^ {2,}\S/.test(lines[end]) || goesOn(lines, end))) {
      inner.push(lines[end].replace(/^ {1,4}/, ""));
      end++;
    }
    list.append(el("li", {}, ...blocks(inner, depth + 1)));
  }
  return [list, end];
}

// An empty line within a list: what follows is indented, or another item.
const goesOn = (lines, at) => !lines[at].trim() && /^(?: {2,}\S)/.test(lines[at + 1] ?? "");

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines[end])) end++;
  return [el("p", {}, ...inlineParts(lines.slice(at, end).join("\n"))), end];
}

function blocks(lines, depth = 0) {
  if (depth > MARKDOWN_DEPTH) return [el("p", {}, lines.join("\n"))];
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const kinds = [fenced, headed, ruled, quoted, tabled, listed, paragraph];
    for (const kind of kinds) {
      const made = kind(lines, at, depth);
      if (!made) continue;
      found.push(made[0]);
      at = made[1];
      break;
    }
    // an empty line between two items of a list parts no list
    while (at < lines.length && !lines[at].trim()) at++;
  }
  return found;
}

// A text as Markdown; as it is, where it is too long.
function markdown(text) {
  if (text.length > MARKDOWN_MOST || !text.trim()) return plain(text);
  return el("div", { class: "text markdown", dir: "auto" }, ...blocks(text.split("\n")));
}
