"use strict";
// The explorer: one state (use case, method, setting, input, view), everything on the page follows from it.
(() => {
  const { cases, floors } = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const views = [...document.querySelectorAll("[name=view]")];
  const state = { c: 0, m: 0, s: 0, i: 0, a: "", v: "beside" };

  const longest = (one) => Math.max(0, one.methods.findIndex((method) => method.joined && method.points.length > 1));
  const middle = (method) => Math.floor((method.points.length - 1) / 2);
  const current = () => {
    const one = cases[state.c];
    const method = one.methods[state.m];
    const point = method.points[state.s];
    return { one, method, point, shown: point.images[state.i] };
  };
  const pointOf = (one, id) => one.methods.flatMap((method) => method.points).find((point) => point.id === id);

  // --- state and address: a setting is named by its row's id, and by its use case and label, which outlive the row ---

  function place(fits) {
    for (const [c, one] of cases.entries())
      for (const [m, method] of one.methods.entries()) {
        const s = method.points.findIndex((point) => fits(one, point));
        if (s >= 0) return { c, m, s };
      }
    return undefined;
  }

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const [id, name, label, text] = ["row", "case", "set", "prompt"].map((key) => given.get(key));
    const found =
      place((one, point) => point.id === id) ??
      place((one, point) => one.name === name && point.label === label) ??
      place((one, point) => point.label === label);
    $("gone").textContent =
      !found && (id || label) ? `${label ?? `Row ${id}`} isn't among the settings of this page any more: here is another.` : "";
    Object.assign(state, found ?? { c: 0, m: longest(cases[0]), s: middle(cases[0].methods[longest(cases[0])]) });
    const { inputs } = cases[state.c];
    const seen = inputs.findIndex(([prompt, seed]) => prompt === text && String(seed) === given.get("seed"));
    state.i = Math.max(0, seen);
    const others = cases[state.c].methods.flatMap((method) => method.points);
    const with_ = given.get("with");
    state.a = (others.find((p) => p.id === with_) ?? others.find((p) => p.label === with_))?.id ?? "";
    state.v = views.some((view) => view.value === given.get("view")) ? given.get("view") : "beside";
  }

  function write() {
    const { one, point } = current();
    const [prompt, seed] = one.inputs[state.i];
    const said = { row: point.id, case: one.name, set: point.label, prompt, seed, view: state.v };
    const other = pointOf(one, state.a);
    if (other) said.with = other.label;
    history.replaceState(null, "", `#${new URLSearchParams(said)}`);
  }

  function change(values) {
    Object.assign(state, values);
    if ("c" in values) Object.assign(state, { m: longest(cases[state.c]), a: "", i: state.i < cases[state.c].inputs.length ? state.i : 0 });
    if (("m" in values || "c" in values) && !("s" in values)) state.s = middle(cases[state.c].methods[state.m]);
    $("gone").textContent = "";
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
    const other = pointOf(one, state.a);
    const against = $("against");
    against.replaceChildren(
      new Option("baseline", "", false, !other),
      ...one.methods.map((own) => {
        const group = document.createElement("optgroup");
        group.label = own.name;
        group.append(...own.points.map((p) => new Option(p.label, p.id, false, p.id === state.a)));
        return group;
      }),
    );
    const stage = document.querySelector(".stage");
    stage.dataset.view = state.v;
    stage.hidden = state.v === "grid";
    const first = other ? other.images[state.i]?.figure : (shown?.base ?? Object.values(method.points).find((p) => p.images[state.i])?.images[state.i].base);
    show("baseline", figure(first), "not made for this prompt");
    show("image", shown && figure(shown.figure), "not made for this prompt");
    $("first").textContent = other ? other.label : "baseline";
    $("caption").textContent = point.label;
    const steps = shown?.mask ? shown.mask.split("1").length - 1 : Math.round(10 * point.steps) / 10;
    const between = point.between ? ` (${point.between[0].toFixed(2)} to ${point.between[1].toFixed(2)})` : "";
    $("readout").textContent = `${point.label}: ${point.speedup.toFixed(2)}×${between}, ${steps} of ${point.total} steps`;
    $("own").textContent = shown ? `This image against the baseline: ${apart(shown)}` : "This prompt has no image of this setting.";
    $("quality").textContent = point.quality;
    $("how").textContent = point.how;
    if (other) difference(other);
    else {
      show("heat", shown && { src: shown.heat, alt: "heat map: where a person would see a difference from the baseline" }, "not made for this prompt");
      $("apart").textContent = shown ? `FLIP ${shown.flip.toFixed(3)}: black is no difference, white the most there is` : "";
    }
    every(method, one);
    trace(shown, point);
    frontier(one);
  }

  const figure = (id) => (id === undefined ? undefined : $(`f${id}`));

  function show(id, image, without) {
    $(id).alt = image ? image.alt : without;
    if (image) $(id).src = image.src;
    else $(id).removeAttribute("src");
  }

  const apart = ({ psnr, st_lpips: seen, flip }) =>
    psnr === null ? "identical" : `PSNR ${decibels(psnr)}${typeof seen === "number" ? `, ST-LPIPS ${seen.toFixed(3)}` : ""}, FLIP ${flip.toFixed(3)}`;

  // of two settings no heat map was made: what their shown pixels differ in, and its PSNR
  async function difference(other) {
    const [a, b] = [$("baseline"), $("image")];
    $("apart").textContent = "";
    show("heat", undefined, "one of both wasn't made for this prompt");
    if (!a.hasAttribute("src") || !b.hasAttribute("src")) return;
    await Promise.all([a.decode(), b.decode()]).catch(() => undefined);
    if (state.a !== other.id || a.naturalWidth !== b.naturalWidth) return;
    const [canvas, pixels] = [document.createElement("canvas"), []];
    Object.assign(canvas, { width: a.naturalWidth, height: a.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    for (const image of [a, b]) {
      context.drawImage(image, 0, 0);
      pixels.push(context.getImageData(0, 0, canvas.width, canvas.height));
    }
    const [one, two] = pixels;
    let error = 0;
    for (let i = 0; i < one.data.length; i += 1) {
      if (i % 4 === 3) continue;
      const by = one.data[i] - two.data[i];
      error += by * by;
      two.data[i] = Math.min(255, 4 * Math.abs(by));
    }
    context.putImageData(two, 0, 0);
    show("heat", { src: canvas.toDataURL(), alt: `what ${current().point.label} and ${other.label} differ in` });
    const psnr = 10 * Math.log10((255 * 255 * 0.75 * one.data.length) / error);
    $("apart").textContent = `${error ? decibels(psnr) : "identical"} between both, of the pixels shown; their difference, four times as bright`;
  }

  function every(method, one) {
    const box = $("every");
    box.hidden = state.v !== "grid";
    if (box.hidden) return;
    const made = (image, words, chosen, act) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", chosen);
      const picture = document.createElement("img");
      Object.assign(picture, { src: image.src, alt: "" });
      button.append(picture, words);
      button.addEventListener("click", act);
      return button;
    };
    const points = method.points.map((point, s) => [point, s]).filter(([point]) => point.images[state.i]);
    const first = points[0]?.[0].images[state.i].base;
    box.replaceChildren(
      ...(first === undefined ? [] : [made(figure(first), "baseline", !state.a, () => change({ a: "" }))]),
      ...points.map(([point, s]) => {
        const own = point.images[state.i];
        const said = `${point.label}: ${point.speedup.toFixed(2)}×, ${decibels(own.psnr)}`;
        return made(figure(own.figure), said, s === state.s, () => change({ s }));
      }),
    );
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

  const shapes = {
    s: "M-5-5H5V5H-5Z", "^": "M0-6 6 5H-6Z", v: "M0 6 6-5H-6Z", "<": "M-6 0 5-6V6Z", ">": "M6 0-5-6V6Z",
    D: "M0-6 6 0 0 6-6 0Z", P: "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", p: "M0-6 6-1 4 5H-4L-6-1Z",
    x: "M-6-4-4-6 0-2 4-6 6-4 2 0 6 4 4 6 0 2-4 6-6 4-2 0Z", "*": "M0-7 2-2H7L3 1 4 6 0 3-4 6-3 1-7-2H-2Z",
    8: "M-2-5H2L5-2V2L2 5H-2L-5 2V-2Z", o: "M-5 0A5 5 0 1 1 5 0 5 5 0 1 1-5 0Z",
  };
  shapes.X = shapes.x;
  const shape = (marker) => shapes[marker] ?? shapes.o;

  function frontier(one) {
    const chart = $("frontier");
    const focused = chart.contains(document.activeElement);
    chart.replaceChildren();
    const [left, right, top, bottom] = [44, 548, 14, 280];
    const points = one.methods.flatMap((method, m) => method.points.map((point, s) => ({ point, method, m, s })));
    const { point: own, shown } = current();
    const finite = [...points.map((p) => p.point.psnr), shown?.psnr].filter((v) => typeof v === "number");
    const [low, high] = [Math.min(...finite, 20) - 1, Math.min(Math.max(...finite, 40), 60) + 4];
    const speeds = points.map((p) => p.point.speedup);
    const [least, most] = [Math.min(...speeds, 0.8), Math.max(...speeds, 1.5) * 1.05];
    const x = (v) => left + ((right - left) * (v - least)) / (most - least);
    const y = (v) => (typeof v === "number" ? bottom - ((bottom - top) * (Math.min(v, high) - low)) / (high - low) : top);
    const ground = svg("g", { "aria-hidden": "true" });
    for (let tick = Math.ceil(2 * least) / 2; tick <= most; tick += most > 4 ? 1 : 0.5) {
      ground.append(svg("line", { x1: x(tick), x2: x(tick), y1: top, y2: bottom, class: "rule" }));
      ground.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, `${tick}×`));
    }
    for (let tick = Math.ceil(low / 10) * 10; tick <= high; tick += 10) {
      ground.append(svg("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "rule" }));
      ground.append(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick));
    }
    ground.append(svg("text", { x: right, y: bottom + 36, "text-anchor": "end" }, "speedup; up: PSNR in dB, identical or over 64 at the top"));
    for (const [name, floor] of Object.entries(floors)) {
      ground.append(svg("line", { x1: left, x2: right, y1: y(floor), y2: y(floor), class: "floor" }));
      ground.append(svg("text", { x: right, y: y(floor) - 4, "text-anchor": "end" }, name));
    }
    for (const [m, method] of one.methods.entries()) {
      if (!method.joined) continue;
      const line = method.points.map((p) => `${x(p.speedup)},${y(p.psnr)}`).join(" ");
      ground.append(svg("polyline", { points: line, class: m === state.m ? "path chosen" : "path" }));
    }
    if (shown) {
      const at = { cx: x(own.speedup), cy: y(shown.psnr) };
      ground.append(svg("line", { x1: at.cx, x2: at.cx, y1: y(own.psnr), y2: at.cy, class: "this" }));
      const ring = svg("circle", { ...at, r: 6, class: "this" });
      ground.append(ring);
    }
    const group = svg("g", { role: "radiogroup", "aria-label": "Settings of the chart, by their speedup" });
    const sorted = points.toSorted((p, q) => p.point.speedup - q.point.speedup);
    const dots = sorted.map(({ point, method, m, s }, place) => {
      const chosen = m === state.m && s === state.s;
      const said = `${point.label}: ${point.speedup.toFixed(2)}×, worst ${decibels(point.psnr)}`;
      const dot = svg("path", {
        d: shape(method.marker), transform: `translate(${x(point.speedup)} ${y(point.psnr)})${chosen ? " scale(1.6)" : ""}`,
        fill: method.colour, class: `point${chosen ? " chosen" : m === state.m ? " near" : ""}`,
        role: "radio", "aria-checked": chosen, "aria-label": said, tabindex: chosen ? 0 : -1,
      });
      dot.append(svg("title", {}, said));
      dot.addEventListener("click", () => change({ m, s }));
      dot.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
        const to = event.key === "Home" ? 0 : event.key === "End" ? sorted.length - 1 : by && place + by;
        if (to === undefined || !sorted[to]) return;
        event.preventDefault();
        change({ m: sorted[to].m, s: sorted[to].s });
      });
      return dot;
    });
    const chosen = dots.find((dot) => dot.getAttribute("aria-checked") === "true");
    group.append(...dots.filter((dot) => dot !== chosen), chosen); // the chosen one above the others
    const flip = x(own.speedup) > 380;
    const name = svg("text", { x: x(own.speedup) + (flip ? -13 : 13), y: y(own.psnr) + 4, "text-anchor": flip ? "end" : "start", class: "name" }, own.mark);
    chart.append(ground, group, name);
    if (focused) chosen.focus();
    const drawn = new Map(one.methods.map((method, m) => [method.family, [method, m]]).reverse());
    $("legend").replaceChildren(
      ...[...drawn.values()].reverse().map(([method, m]) => {
        const [item, button, mark] = [document.createElement("li"), document.createElement("button"), svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" })];
        mark.append(svg("path", { d: shape(method.marker), fill: method.colour, class: "point" }));
        button.type = "button";
        button.setAttribute("aria-pressed", method.family === one.methods[state.m].family);
        button.append(mark, method.family);
        button.addEventListener("click", () => change({ m }));
        item.append(button);
        return item;
      }),
    );
  }

  // the images on show with everything that made them, as one picture
  async function save() {
    const { one, point } = current();
    const [prompt, seed] = one.inputs[state.i];
    const shown = [["baseline", $("first").textContent], ["image", point.label], ["heat", $("apart").textContent]];
    const images = shown.filter(([id]) => $(id).hasAttribute("src"));
    await Promise.all(images.map(([id]) => $(id).decode())).catch(() => undefined);
    const [side, gap] = [360, 16];
    const canvas = document.createElement("canvas");
    canvas.width = 3 * side + 4 * gap;
    const context = canvas.getContext("2d");
    const wrap = (text, width) => {
      const lines = [""];
      for (const word of text.split(" ")) {
        const more = `${lines.at(-1)} ${word}`.trim();
        if (context.measureText(more).width > width && lines.at(-1)) lines.push(word);
        else lines[lines.length - 1] = more;
      }
      return lines;
    };
    const font = "16px system-ui, sans-serif";
    context.font = font;
    const said = [$("readout").textContent, $("own").textContent, $("quality").textContent, `${one.name}, ${one.model}: ${prompt}, seed ${seed}`, document.title];
    const lines = [...said.flatMap((text) => wrap(text, canvas.width - 2 * gap)), "", ...point.how.split("\n")];
    canvas.height = side + 90 + 22 * lines.length + 2 * gap;
    Object.assign(context, { fillStyle: "#ffffff", font, imageSmoothingEnabled: false });
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = "#000000";
    for (const [place, [id, words]] of images.entries()) {
      const at = gap + place * (side + gap);
      context.drawImage($(id), at, gap, side, side);
      for (const [n, line] of wrap(words, side).slice(0, 3).entries()) context.fillText(line, at, side + gap + 22 * (n + 1));
    }
    for (const [n, line] of lines.entries()) context.fillText(line, gap, side + 110 + 22 * n);
    const link = document.createElement("a");
    Object.assign(link, { href: canvas.toDataURL("image/png"), download: `${point.id}.png` });
    link.click();
  }

  // --- what is done ---

  $("case").addEventListener("change", (event) => change({ c: Number(event.target.value) }));
  $("method").addEventListener("change", (event) => change({ m: Number(event.target.value) }));
  $("input").addEventListener("change", (event) => change({ i: Number(event.target.value) }));
  $("setting").addEventListener("input", (event) => change({ s: Number(event.target.value) }));
  for (const view of views) view.addEventListener("change", () => change({ v: view.value }));
  $("against").addEventListener("change", (event) => change({ a: event.target.value }));
  $("swap").addEventListener("click", () => change({ a: current().point.id }));
  $("export").addEventListener("click", save);
  const stage = document.querySelector(".stage");
  const seen = { x: 50, y: 50 };
  const move = (x, y) => {
    for (const [name, value] of Object.entries({ x, y })) {
      seen[name] = Math.min(100, Math.max(0, value));
      stage.style.setProperty(`--${name}`, `${seen[name]}%`);
    }
  };
  $("zoom").addEventListener("input", (event) => stage.style.setProperty("--zoom", event.target.value));
  stage.addEventListener("pointermove", (event) => {
    const frame = event.target.closest(".frame")?.getBoundingClientRect();
    if (frame) move((100 * (event.clientX - frame.x)) / frame.width, (100 * (event.clientY - frame.y)) / frame.height);
  });
  stage.addEventListener("keydown", (event) => {
    const [x, y] = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] }[event.key] ?? [];
    if (x === undefined || event.target !== stage || Number($("zoom").value) === 1) return;
    event.preventDefault();
    move(seen.x + x, seen.y + y);
  });
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
