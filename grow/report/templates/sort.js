// A click on a heading sorts its table by that column: first the largest number or the first name, then the other way.
(function () {
  "use strict";

  function key(row, column) {
    var cell = row.cells[column];
    if (column === 0) return cell.textContent.trim();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  }

  function compare(a, b, downwards) {
    if (a === null || b === null) return (a === null) - (b === null);  // what has no number stays below
    var order = typeof a === "string" ? a.localeCompare(b) : a - b;
    return downwards ? -order : order;
  }

  function sort(table, column) {
    var heading = table.tHead.rows[0].cells[column];
    var first = column === 0 ? "ascending" : "descending";
    var other = column === 0 ? "descending" : "ascending";
    var order = heading.getAttribute("aria-sort") === first ? other : first;
    var rows = Array.from(table.tBodies[0].rows);
    rows.sort(function (a, b) { return compare(key(a, column), key(b, column), order === "descending"); });
    Array.from(table.tHead.rows[0].cells).forEach(function (cell) { cell.removeAttribute("aria-sort"); });
    heading.setAttribute("aria-sort", order);
    table.tBodies[0].append.apply(table.tBodies[0], rows);
  }

  document.querySelectorAll("table.sortable").forEach(function (table) {
    Array.from(table.tHead.rows[0].cells).forEach(function (heading, column) {
      heading.addEventListener("click", function () { sort(table, column); });
    });
  });
})();
