// SortedTable: a table whose headers sort it. The kernel sorts, so that the order is that of the
// same table elsewhere.
function render({ model, el: host }) {
  const status = el("div", { class: "status" });
  const place = el("div", { class: "scroll" });
  const link = connect(model, status, receive);

  // direction: ascending, descending, or none
  function headOf(name, direction, isRight) {
    const arrow = { ascending: "▲", descending: "▼" }[direction] ?? "";
    const sort = () => link.ask({ do: "sort", column: name.key });
    const title = `sort by ${name.text}`;
    const looks = { "data-column": name.text, title, onclick: sort };
    const sign = el("span", { class: "sign", "aria-hidden": "true" }, arrow);
    const button = el("button", looks, name.text, sign);
    const sorted = { scope: "col", "aria-sort": direction, class: isRight ? "right" : "" };
    return el("th", sorted, button);
  }

  function receive({ title, heads, directions, cells, right }) {
    if (!heads) return; // an error; it is told above
    const had = document.activeElement?.dataset?.column;
    const isInside = place.contains(document.activeElement);
    const head = heads.map((text, k) => headOf({ text, key: k }, directions[k], right[k]));
    const cell = (text, k) => el("td", { class: right[k] ? "right" : "" }, text);
    const rows = cells.map((texts) => el("tr", {}, ...texts.map(cell)));
    const table = el(
      "table",
      {},
      el("caption", {}, title),
      el("thead", {}, el("tr", {}, ...head)),
      el("tbody", {}, ...rows),
    );
    place.replaceChildren(table);
    if (!isInside) return;
    const buttons = [...place.querySelectorAll("button")];
    buttons.find((button) => button.dataset.column === had)?.focus();
  }

  const root = frame(place, status);
  root.removeAttribute("tabindex"); // its headers take the keyboard
  root.classList.add("sorted");
  host.classList.add("hnb-host");
  host.append(root);
  link.ask({ do: "open" });
}

export default { render };
