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

function draw(box) {
  const figure = parsed(box.dataset.figure);
  const { data, layout } = night.matches ? recoloured(figure) : figure;
  drawn.add(box);
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
