// The report page: draws figures when they come into sight, follows the reader's light or dark
// system, filters galleries by what is typed, and opens what a link or the printer asks for.

const parsed = (id) => JSON.parse(document.getElementById(id).textContent);
const dark = parsed("dark"); // colour -> what becomes of it at night
const night = matchMedia("(prefers-color-scheme: dark)");
const boxes = document.querySelectorAll("[data-figure]");
const drawn = new Set();

// A figure's JSON with the colours of a dark page.
function recoloured(value) {
  if (typeof value === "string") return dark[value] ?? value;
  if (Array.isArray(value)) return value.map(recoloured);
  if (!value || typeof value !== "object") return value;
  const entries = Object.entries(value).map(([key, inner]) => [key, recoloured(inner)]);
  return Object.fromEntries(entries);
}

// Title and notes stand above as text of the page, which breaks its lines where it must. On a
// narrow page fewer names stand below an axis, and panels beside each other can be scrolled.
function fit(box, layout) {
  const top = layout.margin?.t ?? 90;
  const needed = 16 + (layout.showlegend ? 38 : 0) + (layout.annotations?.length ? 50 : 0);
  layout.title = { text: "" };
  layout.margin = { ...layout.margin, t: needed };
  layout.height -= top - needed;
  const axes = Object.keys(layout).filter((name) => name.startsWith("xaxis"));
  const columns = new Set(axes.map((name) => layout[name].domain?.[0] ?? 0)).size;
  box.style.minWidth = columns > 1 ? `${260 * columns}px` : "";
  const wide = box.clientWidth;
  if (wide < 600) {
    layout.margin = { ...layout.margin, l: 50, r: 42 };
    layout.legend = { ...layout.legend, x: 0, xanchor: "left" };
  }
  for (const name of axes) {
    const { tickvals, ticktext } = layout[name];
    if (!ticktext) continue;
    const every = Math.ceil((ticktext.length * columns * 64) / (wide - 90));
    const some = (values) => values.filter((_, i) => i % every === 0);
    Object.assign(layout[name], { tickvals: some(tickvals), ticktext: some(ticktext) });
  }
}

function draw(box) {
  const figure = parsed(box.dataset.figure);
  const { data, layout } = night.matches ? recoloured(figure) : figure;
  drawn.add(box);
  fit(box, layout);
  Plotly.react(box, data, layout, { responsive: true, displaylogo: false });
}

function drawSeen(entries) {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target);
  }
}

const observer = new IntersectionObserver(drawSeen, { rootMargin: "600px" });
boxes.forEach((box) => observer.observe(box));
// What is folded has no width to be drawn in: it is drawn when it is opened.
function redraw() {
  const boxesDrawn = [...drawn];
  drawn.clear();
  boxesDrawn.filter((box) => box.checkVisibility()).forEach(draw);
}
night.addEventListener("change", redraw);
for (const box of document.querySelectorAll("[data-charts]")) {
  drawCharts(box, parsed(box.dataset.charts), newView());
}

// ---- sections
const sections = [...document.querySelectorAll("details.section")];
const all = document.querySelector("[data-all]");
const isWhole = () => sections.every((section) => section.open);

function openLinked() {
  const section = document.getElementById(location.hash.slice(1));
  if (!sections.includes(section)) return;
  section.open = true;
  section.scrollIntoView();
}

function sayAll() {
  if (all) all.textContent = isWhole() ? "close all" : "open all";
}

addEventListener("hashchange", openLinked);
for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", openLater);
function openLater({ currentTarget }) {
  if (currentTarget.hash === location.hash) openLinked(); // the hash does not change
}
for (const section of sections) section.addEventListener("toggle", sayAll);
all?.addEventListener("click", () => {
  const open = !isWhole();
  sections.forEach((section, i) => (section.open = open || i === 0));
});
openLinked();
sayAll();

// On paper nothing can be opened, so everything is; afterwards it is folded as it was.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
  boxes.forEach(draw);
});
addEventListener("afterprint", () => {
  for (const one of folded) one.open = false;
});

// ---- what is wider than the page
const wide = new ResizeObserver((entries) => entries.forEach(({ target }) => sayWide(target)));
function sayWide(box) {
  const isWide = box.scrollWidth > box.clientWidth + 2;
  let said = box.previousElementSibling;
  if (!said?.matches(".sideways")) {
    if (!isWide) return;
    said = document.createElement("div");
    said.className = "sideways";
    said.textContent = "wider than the page: scroll to the right \u2192";
    box.before(said);
  }
  said.hidden = !isWide;
}
document.querySelectorAll(".tex2jax_ignore").forEach((box) => wide.observe(box));

for (const field of document.querySelectorAll("input[data-filters]")) {
  const gallery = document.getElementById(field.dataset.filters);
  const items = [...gallery.querySelectorAll("details")];
  const count = field.nextElementSibling;
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const item of items) item.hidden = !item.textContent.toLowerCase().includes(wanted);
    const found = items.filter((item) => !item.hidden);
    count.textContent = `${found.length} of ${items.length}`;
  });
}
