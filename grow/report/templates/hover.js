// Pointing at a chart shows the value of every line there. The numbers are those of report.json, embedded above.
(function () {
  "use strict";
  var SVG = "http://www.w3.org/2000/svg";
  var report = JSON.parse(document.getElementById("report").textContent);
  var SUFFIXES = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];

  function count(value) {
    for (var i = 0; i < SUFFIXES.length; i++) {
      if (value >= SUFFIXES[i][0]) return (value / SUFFIXES[i][0]).toPrecision(3) + " " + SUFFIXES[i][1];
    }
    return value.toPrecision(3);
  }

  var WRITE = {
    flops: function (value) { return value.toExponential(2).replace("e+", "×10^") + " FLOPs"; },
    tokens: function (value) { return count(value) + " tokens"; },
    seconds: function (value) { return value.toFixed(value < 100 ? 1 : 0) + " s"; },
    factor: function (value) { return "factor " + value.toPrecision(3); }
  };

  function nearest(points, x) {
    var low = 0, high = points.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
  }

  // Where on an axis a value lies, from 0 to 1, and back
  function share(value, axis) {
    var f = axis.log ? Math.log : Number;
    return (f(value) - f(axis.min)) / (f(axis.max) - f(axis.min));
  }

  function valueAt(part, axis) {
    if (axis.log) return axis.min * Math.pow(axis.max / axis.min, part);
    return axis.min + part * (axis.max - axis.min);
  }

  function element(name, attributes, parent) {
    var made = document.createElementNS(SVG, name);
    Object.keys(attributes).forEach(function (key) { made.setAttribute(key, attributes[key]); });
    parent.appendChild(made);
    return made;
  }

  function watch(svg) {
    var figure = svg.closest("figure");
    var chart = report.charts.find(function (one) { return one.id === svg.dataset.chart; });
    var plot = svg.dataset.plot.split(" ").map(Number);  // left, top, right, bottom
    var lines = chart.series.filter(function (one) { return one.kind !== "logged"; });
    var cursor = element("g", { "class": "cursor", visibility: "hidden" }, svg);
    var rule = element("line", { y1: plot[1], y2: plot[3] }, cursor);
    var dots = lines.map(function (one) { return element("circle", { r: 4, "class": "s" + one.style % 16 }, cursor); });
    var tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.appendChild(tip);

    function toX(value) { return plot[0] + share(value, chart.x) * (plot[2] - plot[0]); }
    function toY(value) { return plot[3] - share(value, chart.y) * (plot[3] - plot[1]); }

    function hide() {
      cursor.setAttribute("visibility", "hidden");
      tip.hidden = true;
    }

    function row(label, value) {
      var line = document.createElement("div");
      var bold = document.createElement("b");
      bold.textContent = value;
      line.append(bold, " " + label);
      return line;
    }

    function show(event) {
      var box = svg.getBoundingClientRect();
      var at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      if (at < plot[0] - 4 || at > plot[2] + 4) return hide();
      var x = valueAt((at - plot[0]) / (plot[2] - plot[0]), chart.x);
      var reach = 0.015 * (plot[2] - plot[0]);
      tip.replaceChildren();
      lines.forEach(function (one, i) {
        var ends = [one.points[0][0], one.points[one.points.length - 1][0]];
        var inside = at > toX(ends[0]) - reach && at < toX(ends[1]) + reach;
        var point = inside ? nearest(one.points, x) : null;
        var visible = inside && toY(point[1]) >= 0;
        dots[i].setAttribute("visibility", visible ? "inherit" : "hidden");
        if (!inside) return;
        dots[i].setAttribute("cx", toX(point[0]));
        dots[i].setAttribute("cy", toY(point[1]));
        tip.append(row(one.name, point[1].toPrecision(4)));
      });
      if (!tip.childElementCount) return hide();
      tip.prepend(chart.x.zero && x < 1.5 * chart.x.zero ? "0" : WRITE[chart.quantity](x));
      rule.setAttribute("x1", at);
      rule.setAttribute("x2", at);
      cursor.setAttribute("visibility", "visible");
      tip.hidden = false;
      var outer = figure.getBoundingClientRect();
      var left = event.clientX - outer.left + 14;
      if (left + tip.offsetWidth > outer.width - 4) left = event.clientX - outer.left - tip.offsetWidth - 14;
      tip.style.transform = "translate(" + Math.max(4, left) + "px," + (box.top - outer.top + 8) + "px)";
    }

    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }

  document.querySelectorAll("svg[data-chart]").forEach(watch);
})();
