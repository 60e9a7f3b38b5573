"use strict";
// The explorer: one state (use case, method, setting, input, view), everything on the page follows from it.
(() => {
  const { cases, floors } = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const views = [...document.querySelectorAll("[name=view]")];
  const state = { c: 0, m: 0, s: 0, i: 0, v: "beside" };

  const clamp = (value, count) => Math.min(Math.max(Number.parseInt(value, 10) || 0, 0), count - 1);
  const middle = (method) => Math.floor((method.points.length - 1) / 2);
  const current = () => {
    const one = cases[state.c];
    const method = one.methods[state.m];
    const point = method.points[state.s];
    return { one, method, point, shown: point.images[state.i] };
  };

  // --- state and address: a setting is named by its row's id, which stays when settings are added ---

  function place(id) {
    for (const [c, one] of cases.entries())
      for (const [m, method] of one.methods.entries()) {
        const s = method.points.findIndex((point) => point.id === id);
        if (s >= 0) return { c, m, s };
      }
    return { c: 0, m: 0, s: middle(cases[0].methods[0]) };
  }

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    Object.assign(state, place(given.get("row")));
    state.i = clamp(given.get("i"), cases[state.c].inputs.length);
    state.v = views.some((view) => view.value === given.get("v")) ? given.get("v") : "beside";
  }

  function write() {
    history.replaceState(null, "", `#${new URLSearchParams({ row: current().point.id, i: state.i, v: state.v })}`);
  }

  function change(values) {
    Object.assign(state, values);
    if ("c" in values) Object.assign(state, { m: 0, i: clamp(state.i, cases[state.c].inputs.length) });
    if (("m" in values || "c" in values) && !("s" in values)) state.s = middle(cases[state.c].methods[state.m]);
    write();
    draw();
  }

  // --- what is seen ---

  function options(select, names, chosen) {
    select.replaceChildren(...names.map((name, i) => new Option(name, i, false, i === chosen)));
  }

  const svg = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const decibels = (psnr) => (psnr === null || psnr === undefined ? "identical" : `${psnr.toFixed(1)} dB`);

  function draw() {
    const { one, method, point, shown } = current();
    options($("case"), cases.map((c) => c.name), state.c);
    options($("method"), one.methods.map((m) => m.name), state.m);
    options($("input"), one.inputs.map(([prompt, seed]) => `${prompt}, seed ${seed}`), state.i);
    const slider = $("setting");
    slider.max = method.points.length - 1;
    slider.value = state.s;
    slider.setAttribute("aria-valuetext", point.label);
    $("ticks").replaceChildren(...method.points.map((p, i) => new Option(p.label, i)));
    $("labels").replaceChildren(
      ...method.points.map((p, i) => {
        const item = document.createElement("li");
        item.textContent = p.mark;
        item.className = i === state.s ? "chosen" : "";
        return item;
      }),
    );
    for (const view of views) view.checked = view.value === state.v;
    document.querySelector(".stage").dataset.view = state.v;
    const baseline = $(`f${one.baseline[state.i]}`);
    $("baseline").src = baseline.src;
    $("baseline").alt = baseline.alt;
    const image = shown && $(`f${shown.figure}`);
    $("image").src = image ? image.src : "";
    $("image").alt = image ? image.alt : "not made for this prompt";
    $("caption").textContent = point.label;
    const steps = shown?.mask ? shown.mask.split("1").length - 1 : Math.round(10 * point.steps) / 10;
    const quality = shown ? decibels(shown.psnr) : "no image of this prompt";
    $("readout").textContent =
      `${point.label}: ${point.speedup.toFixed(2)}×, ${steps} of ${point.total} steps, ${quality}`;
    $("quality").textContent = point.quality;
    $("heat").src = shown ? shown.heat : "";
    $("heat").alt = shown ? "heat map: where a person would see a difference from the baseline" : "not made for this prompt";
    $("apart").textContent = shown ? `FLIP ${shown.flip.toFixed(3)}: black is no difference, white the most there is` : "";
    trace(shown, point);
    frontier(one);
  }

  function trace(shown, point) {
    const chart = $("trace");
    const title = $("trace-title");
    chart.replaceChildren();
    if (!shown?.mask) {
      title.textContent = `${point.label}: every one of its ${point.total} steps is computed.`;
      return;
    }
    const [left, right, top, bottom] = [40, 550, 12, 170];
    const n = shown.mask.length;
    const width = (right - left) / n;
    const seen = (shown.indicator ?? []).map((v) => (typeof v === "number" ? v : null));
    const values = [...seen.filter((v) => v !== null), shown.threshold ?? 0];
    const most = 1.1 * Math.max(...values, 1e-9);
    const y = (v) => bottom - ((bottom - top) * Math.min(v, most)) / most;
    [...shown.mask].forEach((bit, i) => {
      chart.append(
        svg("rect", { x: left + i * width + 1, y: top, width: width - 2, height: bottom - top, class: bit === "1" ? "computed" : "reused" }),
      );
      if (i % 4 === 0) chart.append(svg("text", { x: left + (i + 0.5) * width, y: bottom + 16, "text-anchor": "middle" }, i + 1));
    });
    const dots = seen.map((v, i) => [v, left + (i + 0.5) * width]).filter(([v]) => v !== null);
    if (dots.length) {
      chart.append(svg("polyline", { points: dots.map(([v, x]) => `${x},${y(v)}`).join(" "), class: "indicator" }));
      for (const [v, x] of dots) chart.append(svg("circle", { cx: x, cy: y(v), r: 3, class: "dot" }));
    }
    if (shown.threshold) {
      chart.append(svg("line", { x1: left, x2: right, y1: y(shown.threshold), y2: y(shown.threshold), class: "threshold" }));
      chart.append(svg("text", { x: left - 4, y: y(shown.threshold) + 4, "text-anchor": "end" }, shown.threshold));
    }
    const computed = shown.mask.split("1").length - 1;
    const line = dots.length ? " Line: the change that was seen, against the threshold." : "";
    title.textContent = `Steps: ${computed} computed (filled), ${n - computed} reused.${line}`;
  }

  function frontier(one) {
    const chart = $("frontier");
    chart.replaceChildren();
    const [left, right, top, bottom] = [44, 548, 12, 280];
    const points = one.methods.flatMap((method, m) => method.points.map((point, s) => ({ point, m, s })));
    const finite = points.map((p) => p.point.psnr).filter((v) => v !== null);
    const [low, high] = [Math.min(...finite, 20), Math.max(...finite, 40) + 4];
    const most = Math.max(...points.map((p) => p.point.speedup), 1.5) * 1.05;
    const x = (v) => left + ((right - left) * (v - 0.8)) / (most - 0.8);
    const y = (v) => (v === null ? top : bottom - ((bottom - top) * (v - low)) / (high - low));
    for (let tick = 1; tick <= most; tick += most > 4 ? 1 : 0.5) {
      chart.append(svg("line", { x1: x(tick), x2: x(tick), y1: top, y2: bottom, class: "rule" }));
      chart.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, `${tick}×`));
    }
    for (let tick = Math.ceil(low / 10) * 10; tick <= high; tick += 10) {
      chart.append(svg("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "rule" }));
      chart.append(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick));
    }
    chart.append(svg("text", { x: right, y: bottom + 34, "text-anchor": "end" }, "speedup; up: PSNR of the worst image, in dB"));
    for (const [name, floor] of Object.entries(floors)) {
      chart.append(svg("line", { x1: left, x2: right, y1: y(floor), y2: y(floor), class: "floor" }));
      chart.append(svg("text", { x: right, y: y(floor) - 4, "text-anchor": "end" }, name));
    }
    one.methods.forEach((method, m) => {
      if (!method.joined) return;
      const line = method.points.map((p) => `${x(p.speedup)},${y(p.psnr)}`).join(" ");
      chart.append(svg("polyline", { points: line, class: m === state.m ? "path chosen" : "path" }));
    });
    for (const { point, m, s } of points) {
      const own = m === state.m && s === state.s;
      const dot = svg("circle", { cx: x(point.speedup), cy: y(point.psnr), r: own ? 8 : 5, class: own ? "point chosen" : m === state.m ? "point near" : "point" });
      dot.append(svg("title", {}, `${point.label}: ${point.speedup.toFixed(2)}×, worst ${decibels(point.psnr)}`));
      dot.addEventListener("click", () => change({ m, s }));
      chart.append(dot);
    }
  }

  // --- what is done ---

  $("case").addEventListener("change", (event) => change({ c: Number(event.target.value) }));
  $("method").addEventListener("change", (event) => change({ m: Number(event.target.value) }));
  $("input").addEventListener("change", (event) => change({ i: Number(event.target.value) }));
  $("setting").addEventListener("input", (event) => change({ s: Number(event.target.value) }));
  for (const view of views) view.addEventListener("change", () => change({ v: view.value }));
  $("wipe").addEventListener("input", (event) => {
    document.querySelector(".stage").style.setProperty("--wipe", `${event.target.value}%`);
  });
  document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => {
    read();
    draw();
  });

  $("explorer").hidden = false;
  $("grid").hidden = true;
  read();
  draw();
})();
