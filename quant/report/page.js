// Pressing a column's head sorts its table: numbers from the largest, words from A. Pressing it
// again turns the order around. Missing numbers stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentNode, column = head.cellIndex;
    const numeric = head.classList.contains("number");
    const order = { ascending: "descending", descending: "ascending" }[head.getAttribute("aria-sort")]
      ?? (numeric ? "descending" : "ascending");
    const sign = order === "ascending" ? 1 : -1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const compare = (a, b) => {
      [a, b] = [a.cells[column], b.cells[column]];
      if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
      [a, b] = [parseFloat(a.dataset.value), parseFloat(b.dataset.value)];
      return Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0;
    };
    const body = head.closest("table").tBodies[0];
    body.append(...Array.from(body.rows).sort(compare));
  });
}
