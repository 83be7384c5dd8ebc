"use strict";
// Tables whose headings sort: numbers as numbers, cases without a number last.
for (const heading of document.querySelectorAll("th[aria-sort]")) {
  heading.querySelector("button").addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const rows = [...body.rows];
    const value = (row) => row.cells[heading.cellIndex].dataset.value;
    const numbers = rows.every((row) => value(row) === "" || Number.isFinite(Number(value(row))));
    const before = heading.getAttribute("aria-sort");
    const descending = before === "none" ? numbers : before === "ascending";
    rows.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if ((a === "") !== (b === "")) return a === "" ? 1 : -1;
      const order = numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
      return descending ? -order : order;
    });
    body.append(...rows);
    for (const other of heading.parentElement.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  });
}
