(() => {
  const drawing = element("div");
  drawing.innerHTML = "<svg></svg>"; // whose name space looks like a request where it is written out
  const space = drawing.firstChild.namespaceURI;
  const shape = (tag, values, text) => {
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-3 || size >= 1e7) return value.toExponential(Math.abs(Number(value.toPrecision(3)) - Number(value.toPrecision(1))) > 1e-12 * size ? 2 : 0);
    return size >= 1000 ? count(Math.round(value)) : String(Number(value.toPrecision(4)));
  };

  function evenTicks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
    const ticks = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at++) ticks.push(Number((at * step).toPrecision(12)));
    return ticks;
  }
  function decadeTicks(low, high) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const times of [1, 2, 5]) if (times * 10 ** power >= low && times * 10 ** power <= high) ticks.push(Number((times * 10 ** power).toPrecision(12)));
    return ticks.length <= 8 ? ticks : ticks.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9);
  }
  function range(chart, log) {
    let xs = [Infinity, -Infinity], ys = [Infinity, -Infinity];
    for (const one of chart.series) {
      xs = [Math.min(xs[0], one.x[0]), Math.max(xs[1], one.x[one.x.length - 1])];
      for (const y of one.y) ys = [Math.min(ys[0], y), Math.max(ys[1], y)];
    }
    if (xs[0] === xs[1]) xs = [xs[0] - 1, xs[1] + 1];
    if (log) return { xs, ys: ys[0] === ys[1] ? [ys[0] / 2, ys[1] * 2] : ys };
    if (chart.zero) ys[0] = Math.min(0, ys[0]);
    const pad = (ys[1] - ys[0]) * 0.04 || Math.abs(ys[1]) * 0.1 || 1;
    return { xs, ys: [chart.zero && ys[0] === 0 ? 0 : ys[0] - pad, ys[1] + pad] };
  }
  function nearest(one, x) {
    let low = 0, high = one.x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (one.x[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - one.x[low - 1] <= one.x[low] - x ? low - 1 : low;
  }

  function draw(chart) {
    const card = element("section", undefined, "card"), legend = element("div", undefined, "legend");
    card.dataset.chart = chart.title;
    card.append(element("h3", chart.title), legend);
    for (const one of chart.series) {
      const item = element("span"), key = element("i", undefined, "key " + one.kind);
      key.dataset.colour = one.colour % 8;
      item.append(key, " ", element("bdi", one.name));
      if (chart.series.length > 1) legend.append(item);
    }
    const svg = shape("svg", { role: "img", "aria-label": chart.title }), tip = element("div", undefined, "tip");
    tip.hidden = true;
    card.append(svg, tip);
    let log = chart.log, place = null;
    if (chart.series.every((one) => one.y.every((y) => y > 0))) {
      const button = element("button", "log", "log");
      button.type = "button";
      button.title = "Logarithmic axis";
      button.setAttribute("aria-pressed", log);
      button.addEventListener("click", () => { log = !log; button.setAttribute("aria-pressed", log); paint(); });
      card.append(button);
    }

    function paint() {
      const width = svg.clientWidth, height = svg.clientHeight;
      if (!width) return;
      svg.setAttribute("viewBox", "0 0 " + width + " " + height);
      const { xs, ys } = range(chart, log), to = (y) => (log ? Math.log(y) : y);
      const ticks = log ? decadeTicks(...ys) : evenTicks(...ys, height / 45);
      const texts = ticks.map((tick) => short(tick) + chart.unit);
      const left = 12 + 6.5 * Math.max(2, ...texts.map((text) => text.length)), right = width - 10, top = 16, bottom = height - 20;
      const px = (x) => left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left);
      const py = (y) => bottom - (to(y) - to(ys[0])) / (to(ys[1]) - to(ys[0])) * (bottom - top);
      svg.replaceChildren();
      ticks.forEach((tick, at) => {
        svg.append(shape("line", { class: "tick", x1: left, x2: right, y1: py(tick), y2: py(tick) }));
        svg.append(shape("text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, texts[at]));
      });
      for (const tick of evenTicks(...xs, width / 90)) {
        if (Number.isInteger(tick) && tick >= 0) svg.append(shape("text", { x: px(tick), y: height - 4, "text-anchor": "middle" }, count(tick)));
      }
      let free = -Infinity;
      for (const [step, text] of [...chart.marks].sort((one, other) => one[0] - other[0])) {
        const at = px(step), end = at > right - 40;
        svg.append(shape("line", { class: "mark", x1: at, x2: at, y1: top - 4, y2: bottom }));
        if (at - free > 4) { // else the texts would lie on each other
          svg.append(shape("text", { x: at, y: 9, "text-anchor": end ? "end" : "middle" }, text));
          free = at + (end ? 4 : 6.5 * text.length);
        }
      }
      for (const one of chart.series) {
        const points = one.x.map((x, at) => px(x).toFixed(1) + " " + py(one.y[at]).toFixed(1));
        svg.append(shape("path", { class: one.kind, "data-colour": one.colour % 8, d: "M" + points.join("L") }));
        if (one.kind === "dots" && one.x.length <= 80 || one.x.length === 1)
          for (const point of points) {
            const [cx, cy] = point.split(" ");
            svg.append(shape("circle", { "data-colour": one.colour % 8, cx, cy, r: 3 }));
          }
      }
      place = { xs, px, left, right, top, bottom, width };
    }

    function show(event) {
      if (!place) return;
      const at = Math.min(Math.max(event.clientX - svg.getBoundingClientRect().left, place.left), place.right);
      const x = place.xs[0] + (at - place.left) / (place.right - place.left) * (place.xs[1] - place.xs[0]);
      const found = chart.series.map((one) => nearest(one, x));
      const steps = chart.series.map((one, n) => one.x[found[n]]);
      const step = steps.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best), steps[0]);
      tip.replaceChildren(element("b", "step " + count(step)));
      chart.series.forEach((one, n) => {
        const line = element("div"), key = element("i", undefined, "key " + one.kind), other = steps[n] === step ? "" : " (step " + count(steps[n]) + ")";
        key.dataset.colour = one.colour % 8;
        line.append(key, " ", element("bdi", one.name), " " + short(one.y[found[n]]) + chart.unit + other);
        tip.append(line);
      });
      svg.querySelector(".at")?.remove();
      svg.append(shape("line", { class: "at", x1: place.px(step), x2: place.px(step), y1: place.top, y2: place.bottom }));
      tip.hidden = false;
      const left = place.px(step) + svg.offsetLeft || place.px(step) + 12;
      tip.style.top = 3.4 + "rem";
      tip.style.left = Math.max(4, left > place.width / 2 ? left - tip.offsetWidth - 6 : left + 22) + "px";
    }
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => { tip.hidden = true; svg.querySelector(".at")?.remove(); });
    new ResizeObserver(paint).observe(card);
    return card;
  }
  document.getElementById("charts").append(...data.charts.map(draw));
  if (!data.charts.length) document.getElementById("charts").append(element("p", "No step is reported yet.", "soft"));
})();
