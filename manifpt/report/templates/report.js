"use strict";
// Tables: a button in each head sorts its column; what has no number goes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = Array.from(body.rows).map((row) => ({ row, value: row.cells[column].dataset.value }));
      const isNumber = rows.every(({ value }) => value === "" || !Number.isNaN(Number(value)));
      rows.sort((one, other) => {
        if (one.value === "" || other.value === "") return (one.value === "") - (other.value === "");
        const order = isNumber ? Number(one.value) - Number(other.value) : one.value.localeCompare(other.value);
        return descending ? -order : order;
      });
      body.append(...rows.map(({ row }) => row));
    });
  });
}
// Maps: made when they are opened, since each takes a second on a phone.
for (const details of document.querySelectorAll("details.interactive")) {
  details.addEventListener("toggle", () => {
    const target = details.querySelector(".map");
    if (!details.open || target.childElementCount) return;
    Bokeh.embed.embed_item(JSON.parse(details.querySelector("script").textContent), target.id);
  });
}
