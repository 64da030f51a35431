// What is wrong with how a page looks: text that is cut, lies on other text or is hard to read,
// words broken inside, rings of the focus that leave their box. what: an element, or a selector
// of some. Returns sentences.
(what) => {
  const wrong = [];
  const roots = typeof what === "string" ? [...document.querySelectorAll(what)] : [what];
  const named = (node) => {
    const text = node.getAttribute("aria-label") || node.textContent || node.tagName;
    return text.trim().replace(/\s+/g, " ").slice(0, 60);
  };

  // ---- colours
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const known = new Map();
  function rgba(color) {
    if (!known.has(color)) known.set(color, drawn(color));
    return known.get(color);
  }
  function drawn(color) {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }
  const over = (top, below) =>
    [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  function paperOf(node) {
    const layers = [];
    for (let n = node; n; n = n.parentElement) {
      const style = getComputedStyle(n);
      const isShape = n instanceof SVGElement && !(n instanceof SVGSVGElement);
      const color = rgba(isShape ? "transparent" : style.backgroundColor);
      if (color[3]) layers.push(color);
      if (color[3] === 1) break;
    }
    const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
    const night = dark && matchMedia("(prefers-color-scheme: dark)").matches;
    let paper = night ? [18, 18, 18, 1] : [255, 255, 255, 1];
    for (const layer of layers.reverse()) paper = over(layer, paper);
    return paper;
  }
  function luminance([r, g, b]) {
    const part = (x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  }
  function contrast(node) {
    const style = getComputedStyle(node);
    const ink = [...rgba(node instanceof SVGElement ? style.fill : style.color)];
    for (let n = node; n; n = n.parentElement) ink[3] *= Number(getComputedStyle(n).opacity);
    const paper = paperOf(node);
    const values = [luminance(over(ink, paper)), luminance(paper)].sort((a, b) => a - b);
    return (values[1] + 0.05) / (values[0] + 0.05);
  }

  // ---- boxes
  const clips = (node, axis) => getComputedStyle(node)[`overflow${axis}`] !== "visible";
  function boxAround(node) {
    for (let n = node.parentElement; n; n = n.parentElement) {
      if (clips(n, "X") || clips(n, "Y")) return n;
    }
    return document.documentElement;
  }
  const scrolls = (node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  const FIELDS = "input, select, canvas, textarea, progress";
  const inside = (a, b) =>
    a.left >= b.left - 1.5 && a.right <= b.right + 1.5 && a.top >= b.top - 1.5 &&
    a.bottom <= b.bottom + 1.5;

  // the part of a box that those who hold it let through; null: none
  function seen(node, { left, right, top, bottom }) {
    for (let n = node; n; n = n.parentElement) {
      const isInline = getComputedStyle(n).display === "inline";
      if (isInline || !(clips(n, "X") || clips(n, "Y"))) continue;
      const frame = n.getBoundingClientRect();
      [left, right] = [Math.max(left, frame.left), Math.min(right, frame.right)];
      [top, bottom] = [Math.max(top, frame.top), Math.min(bottom, frame.bottom)];
    }
    return right - left > 1 && bottom - top > 1 ? { left, right, top, bottom } : null;
  }

  const texts = [];
  for (const root of roots) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
      const node = text.parentElement;
      if (!text.data.trim() || node.closest("script, style, option, [hidden], defs, .hoverlayer")) {
        continue;
      }
      if (!node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
      const range = document.createRange();
      range.selectNodeContents(text);
      const boxes = [...range.getClientRects()].filter((b) => b.width > 1 && b.height > 1);
      if (boxes.length) texts.push({ node, boxes, text: text.data.trim() });
    }
  }
  // what is no text has a place all the same
  for (const node of roots.flatMap((root) => [...root.querySelectorAll(FIELDS)])) {
    if (!node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const box = node.getBoundingClientRect();
    if (box.width > 1) texts.push({ node, boxes: [box], text: named(node), isField: true });
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth + 1) {
    wrong.push(`the page is ${page.scrollWidth} pixels wide in a window of ${page.clientWidth}`);
  }
  for (const { node, boxes, text, isField } of texts) {
    const ratio = isField || node.closest(":disabled") ? 21 : contrast(node);
    if (ratio < 4.5) wrong.push(`contrast ${ratio.toFixed(2)}: ${text.slice(0, 60)}`);
    if (getComputedStyle(node).wordBreak === "break-all") wrong.push(`breaks words: ${named(node)}`);
    const own = getComputedStyle(node);
    const isTold = own.textOverflow === "ellipsis" || scrolls(node) || own.display === "inline";
    if (!isField && !isTold && node.scrollWidth > node.clientWidth + 1 && clips(node, "X")) {
      wrong.push(`cut: ${named(node)}, ${node.scrollWidth} in ${node.clientWidth}`);
    }
    const around = boxAround(node);
    if (around === page || scrolls(around)) {
      const isFree = around === page && !(clips(node, "X") && scrolls(node));
      if (isFree && boxes.some((b) => b.left < -1 || b.right > page.clientWidth + 1)) {
        wrong.push(`cut by the page: ${named(node)}`);
      }
      continue;
    }
    const frame = around.getBoundingClientRect();
    const isTall = ["auto", "scroll"].includes(getComputedStyle(around).overflowY);
    if (!isTall && boxes.some((b) => !inside(b, frame))) wrong.push(`cut: ${named(node)}`);
  }
  for (const image of roots.flatMap((root) => [...root.querySelectorAll("img, .js-plotly-plot")])) {
    if (!image.checkVisibility()) continue;
    const [box, frame] = [image, boxAround(image)].map((n) => n.getBoundingClientRect());
    if (!scrolls(boxAround(image)) && box.right > frame.right + 1.5) {
      wrong.push(`a picture is cut: ${image.alt ?? named(image)}`);
    }
    if (image.tagName === "IMG" && !image.alt) wrong.push("a picture without words");
  }

  // ---- text on text
  // a sign of more text lies on the text that it speaks of
  const lies = texts.filter(({ node }) => !node.matches(".more"));
  const places = lies.flatMap((t) => t.boxes.map((box) => ({ ...t, box: seen(t.node, box) })));
  const flat = places.filter(({ box }) => box);
  flat.sort((a, b) => a.box.top - b.box.top);
  for (let i = 0; i < flat.length; i++) {
    for (let j = i + 1; j < flat.length && flat[j].box.top < flat[i].box.bottom - 3; j++) {
      const [a, b] = [flat[i], flat[j]];
      if (a.node === b.node || a.node.contains(b.node) || b.node.contains(a.node)) continue;
      const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      if (across > 2) wrong.push(`on each other: ${a.text.slice(0, 40)} | ${b.text.slice(0, 40)}`);
    }
  }

  // ---- the ring of the focus
  const reached = "button, input, summary, a[href], select, textarea, [tabindex='0']";
  for (const node of roots.flatMap((root) => [...root.querySelectorAll(reached)])) {
    if (node.disabled || node.closest(".modebar") || !node.checkVisibility()) continue;
    node.focus({ focusVisible: true, preventScroll: true });
    if (document.activeElement !== node) continue;
    const style = getComputedStyle(node);
    if (style.outlineStyle === "none") wrong.push(`no ring: ${named(node)}`);
    const room = Math.max(0, parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset));
    const box = node.getBoundingClientRect();
    const frame = boxAround(node).getBoundingClientRect();
    const holder = getComputedStyle(boxAround(node)); // what scrolls follows the focus
    const isFixed = (axis) => !["auto", "scroll"].includes(holder[`overflow${axis}`]);
    const isBeside = box.left - room < frame.left - 0.6 || box.right + room > frame.right + 0.6;
    const isAbove = box.top - room < frame.top - 0.6 || box.bottom + room > frame.bottom + 0.6;
    if ((isFixed("X") && isBeside) || (isFixed("Y") && isAbove)) {
      wrong.push(`its ring is cut: ${named(node) || node.type}`);
    }
  }
  document.activeElement?.blur();
  return [...new Set(wrong)];
}
