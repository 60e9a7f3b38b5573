"use strict";
// Sorts tables, and shows the columns that there is room for, the others when asked; the points of charts say what they
// are. Without it a table is whole and scrolls, and a chart's description has its values.
(() => {
  for (const point of document.querySelectorAll(".fx-point")) {
    const [left, top] = point.dataset.at.split(" ").map(Number);
    point.style.left = `${left}%`;
    point.style.top = `${top}%`;
    point.classList.add(left > 60 ? "fx-left" : "fx-right");
  }

  const raised = { "⁻": "-", "⁰": 0, "¹": 1, "²": 2, "³": 3, "⁴": 4, "⁵": 5, "⁶": 6, "⁷": 7, "⁸": 8, "⁹": 9 };
  const size = (cell) => {
    if (cell.dataset.value !== undefined) return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
    const text = cell.textContent.trim().replaceAll("−", "-").replace(/^≈ /, "").replace("∞", "Infinity");
    return Number.parseFloat(text.replace(/×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)/, (_, power) => `e${[...power].map((c) => raised[c]).join("")}`));
  };

  function sort(table, head, column) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const groups = [];
    for (const row of table.tBodies[0].rows) {
      if (row.classList.contains("fx-why") && groups.length) groups.at(-1).push(row);
      else groups.push([row]);
    }
    const numeric = head.dataset.kind ? head.dataset.kind === "number" : head.classList.contains("fx-number");
    const value = ([row]) => (numeric ? size(row.cells[column]) : row.cells[column].textContent.trim().toLowerCase());
    const missing = (v) => v === "–" || Number.isNaN(v);
    groups.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y); // last, whichever way
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    });
    table.tBodies[0].append(...groups.flat());
  }

  function show(table, hidden) {
    const count = table.tHead.rows[0].cells.length;
    for (const row of table.rows)
      if (row.classList.contains("fx-why")) row.cells[0].colSpan = count - hidden.size;
      else [...row.cells].forEach((cell, i) => { cell.hidden = hidden.has(i); });
  }

  function fit(table, box, more) {
    const heads = [...table.tHead.rows[0].cells];
    show(table, new Set());
    box.classList.remove("fx-fits");
    const narrow = document.documentElement.clientWidth < 800; // there a table is scrolled, beside its first column
    const hidden = new Set();
    const ends = [0, heads.at(-1).textContent.trim() === "row" ? heads.length - 1 : 0];
    const later = (i) => Number("later" in heads[i].dataset); // first what is there to be looked up, then from the right
    const order = heads.map((_, i) => i).filter((i) => !ends.includes(i)).sort((a, b) => later(b) - later(a) || b - a);
    const over = () => box.scrollWidth > box.clientWidth + 1;
    if (!narrow && !more.open) {
      let excess = table.offsetWidth - box.clientWidth;
      for (const i of order) {
        if (!over()) break;
        hidden.add(i);
        excess -= heads[i].offsetWidth;
        if (excess > 0 && i !== order.at(-1)) continue; // to look again is slow
        show(table, hidden);
        excess = table.offsetWidth - box.clientWidth;
      }
    }
    box.classList.toggle("fx-fits", !over());
    more.button.hidden = !hidden.size && !more.open;
    more.button.setAttribute("aria-expanded", String(more.open));
    const names = heads.filter((_, i) => hidden.has(i)).map((head) => head.textContent.trim());
    more.button.textContent = more.open ? "Fewer columns" : `${names.length} more column${names.length > 1 ? "s" : ""}: ${names.join(", ")}`;
  }

  for (const table of document.querySelectorAll("table.fx-table:not(.fx-survive)")) {
    const box = table.closest(".fx-scroll");
    if (!table.tHead || !box) continue;
    if (table.tBodies[0].querySelectorAll("tr:not(.fx-why)").length > 2)
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        const button = document.createElement("button");
        button.type = "button";
        button.className = "sort";
        button.append(...head.childNodes);
        head.append(button);
        button.addEventListener("click", () => sort(table, head, column));
      });
    const more = { open: false, button: document.createElement("button") };
    more.button.type = "button";
    more.button.className = "fx-more";
    box.before(more.button);
    const again = () => box.clientWidth && fit(table, box, more);
    more.button.addEventListener("click", () => {
      more.open = !more.open;
      again();
    });
    new ResizeObserver(again).observe(box.parentElement); // also where a closed part is opened
    again();
  }
  // A row's address leads to its line, whatever it lies in: also where tables have found their place, or are in a part
  // that is closed.
  const lead = () => {
    const line = /^#(row|claim)-[0-9a-f]+$/.test(location.hash) && document.querySelector(location.hash);
    if (!line) return;
    for (let part = line.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    line.hidden = false;
    setTimeout(() => line.scrollIntoView({ block: "center", behavior: "instant" }), 50);
  };
  addEventListener("load", lead);
  addEventListener("hashchange", lead);
})();
