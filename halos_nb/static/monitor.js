// RunMonitor's panel: state, Stop, charts (charts.js), log. Every text of a run reaches the page
// through textContent.

function render({ model, el }) {
  el.classList.add("halos-monitor");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's keys stay out
  const top = add(el, "div", { class: "top" });
  const badge = add(top, "b", { class: "badge" });
  const bar = add(top, "progress", { max: 1, "aria-label": "share of the stage that is done" });
  const text = add(top, "span", { class: "text" });
  const hint = "End what is running of this run; start it again and it goes on from here";
  const stop = add(top, "button", { type: "button", title: hint }, "Stop");
  const warning = add(el, "div", { class: "warning", role: "alert" });
  const charts = add(el, "div");
  const view = newView();
  const more = add(el, "details");
  const head = add(more, "summary", {}, "Log");
  const log = add(more, "pre");

  stop.onclick = () => {
    stop.disabled = true;
    stop.textContent = "Stopping…";
    model.send({ stop: true });
  };

  // What is below stays where it is when the words get fewer: the line keeps the room that it had.
  let [room, width] = [0, 0];
  function keepRoom(isRunning) {
    if (el.clientWidth !== width) [room, width] = [0, el.clientWidth];
    top.style.minHeight = "";
    room = isRunning ? Math.max(room, top.getBoundingClientRect().height) : 0;
    top.style.minHeight = room ? `${room}px` : "";
  }

  function showStatus() {
    const status = model.get("status");
    badge.textContent = status.state;
    badge.dataset.state = status.state;
    text.textContent = status.text;
    warning.textContent = status.warning;
    warning.hidden = !status.warning;
    bar.hidden = status.share === null;
    bar.value = status.share ?? 0;
    stop.disabled = status.state !== "running" || status.stopping;
    stop.textContent = status.stopping ? "Stopping…" : "Stop";
    log.textContent = status.log.join("\n");
    head.textContent = "The last lines of the log";
    more.hidden = !status.log.length;
    keepRoom(status.state === "running");
  }

  const showCurves = () => drawCharts(charts, model.get("curves"), view);

  model.on("change:status", showStatus);
  model.on("change:curves", showCurves);
  showStatus();
  showCurves();
  return () => {
    model.off("change:status", showStatus);
    model.off("change:curves", showCurves);
  };
}

export default { render };
