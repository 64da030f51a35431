// The report page: draws figures when they come into sight, follows the reader's light or dark
// system, and filters galleries by what is typed.

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
night.addEventListener("change", () => drawn.forEach(draw));
for (const box of document.querySelectorAll("[data-charts]")) {
  drawCharts(box, parsed(box.dataset.charts), newView());
}
addEventListener("beforeprint", () => boxes.forEach(draw));

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
