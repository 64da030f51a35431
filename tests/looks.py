"""What a page shows, measured in the page: parts that are cut or lie on each other, text that
is hard to read, rings that are cut. For any view; each complaint is a line.
"""

# what is said of each part of `root` that a reader could not use
MEASURE = """root => {
  const said = [];
  const shown = e => e.checkVisibility({checkVisibilityCSS: true, checkOpacity: true});
  const name = e => `${e.tagName.toLowerCase()}.${e.className} "${
    (e.getAttribute('aria-label') ?? e.textContent).trim().slice(0, 40)}"`;
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflow);
  // the part of a box that those who hold it let through; null: none
  const seen = e => {
    let {left, right, top, bottom} = e.getBoundingClientRect();
    for (let p = e.parentElement; p && root.contains(p); p = p.parentElement) {
      if (getComputedStyle(p).overflow === 'visible') continue;
      const box = p.getBoundingClientRect();
      left = Math.max(left, box.left); right = Math.min(right, box.right);
      top = Math.max(top, box.top); bottom = Math.min(bottom, box.bottom);
    }
    return right - left > 1 && bottom - top > 1 ? {left, right, top, bottom} : null;
  };
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return /^color/.test(text) ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], [x, y, z]) =>
    [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const behind = e => {
    const layers = [];
    for (let p = e; p; p = p.parentElement)
      layers.push(parse(getComputedStyle(p).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const outer = root.getBoundingClientRect();
  const all = [...root.querySelectorAll('*')].filter(shown);
  const fields = 'input, select, canvas, textarea, progress';
  const parts = all.filter(e => own(e) || e.matches(fields));
  for (const e of parts) {
    const box = e.getBoundingClientRect();
    if (box.right > outer.right + 1 || box.left < outer.left - 1) {
      let held = false;
      for (let p = e.parentElement; p !== root; p = p.parentElement) held ||= scrolls(p);
      if (!held) said.push(`beyond the edge: ${name(e)}`);
    }
    const style = getComputedStyle(e);
    const told = style.textOverflow === 'ellipsis' || scrolls(e) || e.matches('select, option');
    if (!told && style.display !== 'inline' && e.scrollWidth > e.clientWidth + 1 && own(e))
      said.push(`cut: ${name(e)}, ${e.scrollWidth} in ${e.clientWidth}`);
    if (own(e) && !e.disabled) {
      const back = behind(e);
      const ratio = contrast(over(parse(style.color), back), back);
      if (ratio < 4.5) said.push(`contrast ${ratio.toFixed(2)}: ${name(e)}`);
    }
  }
  // words within a line that goes over two lines have a box that is no box
  const flows = e => getComputedStyle(e).display === 'inline' && e.getClientRects().length > 1;
  const boxes = parts.filter(e => !flows(e)).map(e => [e, seen(e)]).filter(([, box]) => box);
  boxes.forEach(([a, p], i) => {
    for (const [b, q] of boxes.slice(i + 1)) {
      if (a.contains(b) || b.contains(a) || a.matches('.more') || b.matches('.more')) continue;
      const [wide, high] = [Math.min(p.right, q.right) - Math.max(p.left, q.left),
                            Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top)];
      if (wide > 2 && high > 3) said.push(`on each other: ${name(a)} and ${name(b)}`);
    }
  });
  return [...new Set(said)].slice(0, 12);
}"""

# the ring around what has the focus, as far as it lies outside of what holds it
RING = """root => {
  const said = [];
  const kinds = 'button, input, select, textarea, summary';
  const focusable = [root, ...root.querySelectorAll(kinds)];
  for (const e of focusable.filter(e => !e.disabled && e.checkVisibility()).slice(0, 40)) {
    e.focus({preventScroll: true, focusVisible: true});
    const style = getComputedStyle(e);
    const width = parseFloat(style.outlineWidth);
    if (style.outlineStyle === 'none' || !width) said.push(`no ring: ${e.tagName} ${e.title}`);
    if (parseFloat(style.outlineOffset) + width > 0.5)
      said.push(`a ring outside its box: ${e.tagName} ${e.className}`);
  }
  root.focus({preventScroll: true});
  return [...new Set(said)];
}"""


def complaints(locator):
    "What is wrong with how a part of a page looks."
    return [*locator.evaluate(MEASURE), *locator.evaluate(RING)]
