"use strict";
(() => {
  const data = document.getElementById("front-data");
  if (!data) return;
  const front = JSON.parse(data.textContent);
  const svg = document.getElementById("front-points");
  const words = document.getElementById("front-words");
  const drawing = document.getElementById("front-mask");
  const make = (name, attributes, parent) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.appendChild(made);
    return made;
  };
  const left = 62, right = 620, top = 16, bottom = 352;
  const xs = front.points.map((p) => p.x).concat(front.limit === null ? [] : [front.limit]);
  const ys = front.points.map((p) => Math.log10(p.y));
  const span = (values, pad) => {
    const low = Math.min(...values), high = Math.max(...values);
    const room = pad * Math.max(high - low, 1e-9);
    return [low - room, high + room];
  };
  const [x0, x1] = span(xs, 0.05), [y0, y1] = span(ys, 0.06);
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (right - left);
  const y = (value) => bottom - ((Math.log10(value) - y0) / (y1 - y0)) * (bottom - top);

  make("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }, svg);
  make("line", { x1: left, x2: left, y1: top, y2: bottom, class: "axis" }, svg);
  for (let i = 0; i <= 5; i++) {
    const value = x0 + ((x1 - x0) * i) / 5;
    const text = make("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, svg);
    text.textContent = value.toFixed(2) + "x";
  }
  for (let decade = Math.ceil(y0 - 1); decade <= y1 + 1; decade++) {
    for (const step of [1, 2, 5]) {
      const value = step * 10 ** decade, at = Math.log10(value);
      if (at < y0 || at > y1) continue;
      make("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "axis" }, svg);
      const text = make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, svg);
      text.textContent = String(Number(value.toPrecision(2)));
    }
  }
  const label = make("text", { x: (left + right) / 2, y: 388, "text-anchor": "middle" }, svg);
  label.textContent = front.x + ", as a share of the teacher's";
  const side = make("text", { transform: "translate(14 190) rotate(-90)", "text-anchor": "middle" }, svg);
  side.textContent = "output error";
  if (front.limit !== null) {
    make("line", { x1: x(front.limit), x2: x(front.limit), y1: top, y2: bottom, class: "limit" }, svg);
  }

  const boxes = {};
  const across = front.blocks.map((b) => b.x), down = front.blocks.map((b) => -b.y);
  const edge = 0.7, least = Math.min(...across) - edge, above = Math.min(...down) - edge;
  const wide = Math.max(...across) - least + edge, high = Math.max(...down) - above + edge;
  drawing.setAttribute("viewBox", [least, above, wide, high].join(" "));
  for (const block of front.blocks) {
    const box = make("rect", {
      x: block.x - 0.42, y: -block.y - 0.3, width: 0.84, height: 0.6,
      rx: block.kind === "residual" ? 0.06 : 0.28, class: "block " + block.kind,
    }, drawing);
    make("title", {}, box).textContent = block.name;
    boxes[block.name] = box;
  }

  const order = front.points.map((_, i) => i).sort((a, b) => front.points[a].x - front.points[b].x);
  const dots = [];
  const show = (index) => {
    const point = front.points[index];
    dots.forEach((dot, i) => dot.classList.toggle("on", i === index));
    words.textContent = point.words;
    const gone = new Set(point.removed.map((i) => front.blocks[i].name));
    for (const [name, box] of Object.entries(boxes)) box.classList.toggle("gone", gone.has(name));
  };
  front.points.forEach((point, index) => {
    const dot = make("circle", {
      cx: x(point.x), cy: y(point.y), r: point.kind === "won" ? 8 : point.kind ? 5.5 : 4,
      class: point.kind, tabindex: index === front.winner ? 0 : -1, role: "button",
      "aria-label": point.words,
    }, svg);
    dot.addEventListener("pointerenter", () => show(index));
    dot.addEventListener("focus", () => show(index));
    dot.addEventListener("click", () => { dot.focus(); show(index); });
    dot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = order[Math.min(Math.max(order.indexOf(index) + step, 0), order.length - 1)];
      dots[next].focus();
    });
    dots.push(dot);
  });
  show(front.winner);
})();
