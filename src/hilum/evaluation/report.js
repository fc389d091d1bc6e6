(function () {
  "use strict";
  document.documentElement.classList.add("scripted");

  document.querySelectorAll("table[data-sortable]").forEach(function (table) {
    var body = table.tBodies[0];
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell, column) {
      var button = document.createElement("button");
      button.type = "button";
      while (cell.firstChild) button.appendChild(cell.firstChild);
      cell.appendChild(button);
      button.addEventListener("click", function () {
        var numeric = cell.classList.contains("number");
        var first = numeric ? "descending" : "ascending";
        var second = numeric ? "ascending" : "descending";
        var direction = cell.getAttribute("aria-sort") === first ? second : first;
        Array.prototype.forEach.call(cell.parentNode.cells, function (other) { other.removeAttribute("aria-sort"); });
        cell.setAttribute("aria-sort", direction);
        var sign = direction === "ascending" ? 1 : -1;
        var rows = Array.prototype.map.call(body.rows, function (row, place) {
          return { row: row, place: place, key: row.cells[column].getAttribute("data-sort") };
        });
        rows.sort(function (a, b) {
          if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "") || a.place - b.place;
          var order = isNaN(a.key) || isNaN(b.key) ? a.key.localeCompare(b.key) : a.key - b.key;
          return sign * order || a.place - b.place;
        });
        rows.forEach(function (entry) { body.appendChild(entry.row); });
      });
    });
  });

  var controls = document.querySelector(".controls");
  if (controls) {
    controls.hidden = false;
    var section = document.getElementById("examples");
    document.getElementById("heat").addEventListener("input", function (event) {
      section.style.setProperty("--heat", event.target.value / 100);
    });
    var outline = document.getElementById("outline");
    if (outline) outline.addEventListener("change", function (event) {
      section.classList.toggle("outlined", event.target.checked);
    });
  }
})();
