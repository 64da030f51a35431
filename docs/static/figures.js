// Figures are drawn when they come into view, in the colours of the page.
(() => {
  const dark = () => {
    const said = document.body.dataset.theme;
    if (said === "light" || said === "dark") return said === "dark";
    return matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const colours = () => {
    const style = getComputedStyle(document.body);
    const ink = style.getPropertyValue("--color-foreground-primary").trim();
    const grid = style.getPropertyValue("--color-background-border").trim();
    const small = style.getPropertyValue("--color-foreground-muted").trim();
    return { ink: ink || (dark() ? "#ddd" : "#111"), small: small || ink, grid: grid || "#888" };
  };
  const themed = (layout) => {
    const { ink, small, grid } = colours();
    const out = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    out.font = { ...layout.font, color: ink };
    // whatever its template says of them
    const { font, subtitle, ...title } = typeof layout.title === "string" ? { text: layout.title } : layout.title || {};
    out.title = { ...title, font: { ...font, color: ink } };
    out.title.subtitle = { ...subtitle, font: { ...subtitle?.font, color: small } };
    out.width = undefined;
    out.autosize = true;
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key))
        out[key] = { ...layout[key], gridcolor: grid, linecolor: ink, zerolinecolor: grid };
    }
    return out;
  };
  const inked = (trace) => {
    const { ink } = colours();
    const out = { ...trace };
    for (const key of ["error_x", "error_y"]) {
      if (trace.type === "bar" && trace[key] && !trace[key].color) out[key] = { ...trace[key], color: ink };
    }
    return out;
  };
  const draw = (box) => {
    const script = box.querySelector('script[type="application/json"]');
    if (!script || !window.Plotly) return;
    const figure = JSON.parse(script.textContent);
    let place = box.querySelector(".plot");
    if (!place) {
      place = document.createElement("div");
      place.className = "plot";
      box.append(place);
    }
    const options = { responsive: true, displaylogo: false };
    Plotly.react(place, (figure.data || []).map(inked), themed(figure.layout || {}), options);
  };
  const start = () => {
    const boxes = [...document.querySelectorAll("div.figure")];
    const seen = new Set();
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting || seen.has(entry.target)) continue;
        seen.add(entry.target);
        draw(entry.target);
      }
    }, { rootMargin: "300px" });
    boxes.forEach((box) => watcher.observe(box));
    const again = () => seen.forEach(draw);
    new MutationObserver(again).observe(document.body, { attributeFilter: ["data-theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
