"""A page in headless Chromium: what it shows, whether it complains, and what its scripts do."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
# Collects errors from the first moment; once all is drawn, points at every visible chart, sorts every table by its last
# column, by that the other way and by its first, and tells the frame's owner
PROBE = """<script>
var errors = [];
addEventListener("error", function (event) { errors.push(event.message); });
addEventListener("securitypolicyviolation", function (event) { errors.push(event.blockedURI); });
console.error = function () { errors.push(Array.from(arguments).join(" ")); };
addEventListener("load", function () {
  var tips = [];
  document.querySelectorAll("svg[data-chart]").forEach(function (svg) {
    var box = svg.getBoundingClientRect();
    if (!box.width) return;
    var at = { clientX: box.left + 0.8 * box.width, clientY: box.top + 50, bubbles: true };
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    svg.closest("figure").querySelectorAll(".tip:not([hidden])").forEach(function (tip) {
      tips.push({ chart: svg.dataset.chart, text: tip.innerText });
    });
  });
  var sorted = {};
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var last = table.tHead.rows[0].cells.length - 1;
    sorted[table.dataset.table] = [last, last, 0].map(function (column) {
      table.tHead.rows[0].cells[column].querySelector("button").click();
      return Array.from(table.tBodies[0].rows).map(function (row) { return row.cells[0].textContent; });
    });
  });
  var root = document.documentElement, table = document.querySelector(".scroll");
  parent.postMessage({
    errors: errors, tips: tips, sorted: sorted, text: document.body.innerText,
    width: innerWidth, content: root.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor, hidden_table: table.scrollWidth - table.clientWidth
  }, "*");
});
</script>"""
OWNER = """<!doctype html><pre id="result"></pre><script>
addEventListener("message", function (event) {
  document.getElementById("result").textContent = JSON.stringify(event.data);
});
</script><iframe src="page.html" style="border: 0; width: %dpx; height: 3000px"></iframe>"""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install the package `chromium`")


def look_at(page: str, width: int, folder: Path, *flags: str) -> dict[str, Any]:
    """What Chromium makes of a page at a width. It opens no window narrower than 500, so the page is in a frame."""
    folder.mkdir()
    (folder / "page.html").write_text(page.replace("<head>", "<head>" + PROBE))
    (folder / "owner.html").write_text(OWNER % width)
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
    address = f"file://{folder / 'owner.html'}"
    dumped = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.+?)</pre>', dumped.stdout, re.DOTALL)
    assert found, dumped.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
