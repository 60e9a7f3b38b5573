"use strict";
// Filters the ledger; without it the table is whole.
(() => {
  const table = document.getElementById("ledger");
  const rows = [...table.tBodies[0].rows];
  const form = document.querySelector("form.filters");
  const find = document.getElementById("find");
  const shown = document.getElementById("shown");
  form.hidden = false;

  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const verdicts = new Set([...form.querySelectorAll("[name=verdict]:checked")].map((box) => box.value));
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !verdicts.has(row.dataset.verdict) || !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length} claims`;
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
