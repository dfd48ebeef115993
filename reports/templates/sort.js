for (const head of document.querySelectorAll(".sortable thead th")) {
  head.querySelector("button").addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    const text = head.classList.contains("text");
    const rank = row => { const c = row.cells[column]; return text ? c.textContent : parseFloat(c.dataset.v); };
    // what has no number stays below, whichever way the others are sorted
    const order = (a, b) => text ? down * a.localeCompare(b) : isNaN(a) - isNaN(b) || down * (a - b) || 0;
    [...body.rows].sort((a, b) => order(rank(a), rank(b))).forEach(row => body.append(row));
  });
}
