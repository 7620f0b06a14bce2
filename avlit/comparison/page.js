"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const shown = data.runs.map(() => true);
const LEFT = 48, RIGHT = 14, TOP = 6, BOTTOM = 20;
const $ = (id) => document.getElementById(id);

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

for (const panel of data.panels)
  for (const line of [...panel.lines, ...(panel.reference ? [panel.reference] : [])])
    for (const key of ["steps", "means", "least", "greatest"]) line[key] = line[key] && unpack(line[key]);

// Exponential weights of the distance in steps, in both directions: no lag, whatever the spacing of the points.
function smooth(steps, values, width) {
  const n = steps.length, sums = new Float64Array(n), weights = new Float64Array(n);
  if (!(width > 0)) return values;
  for (const order of [1, -1]) {
    let sum = 0, weight = 0, last = null;
    for (let k = 0; k < n; k++) {
      const i = order > 0 ? k : n - 1 - k;
      const decay = last === null ? 1 : Math.exp(-Math.abs(steps[i] - last) / width);
      sum *= decay; weight *= decay; last = steps[i];
      if (Number.isFinite(values[i])) { sum += values[i]; weight += 1; }
      sums[i] += sum; weights[i] += weight;
    }
  }
  return values.map((value, i) => {  // the point itself was counted twice
    const own = Number.isFinite(value) ? 1 : 0;
    const weight = weights[i] - own;
    return weight > 1e-9 ? (sums[i] - (own ? value : 0)) / weight : NaN;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || 10 * power;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return found;
}

const short = (v) => v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3
  ? v.toExponential(1).replace("e+", "e") : String(+v.toPrecision(4));

function quantile(values, q) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  return sorted[Math.round((sorted.length - 1) * q)];
}

// The part of a line from x0 to x1, with interpolated ends: what the axis has to hold of it.
function within(line, x0, x1) {
  const steps = [...line.steps], last = steps.length - 1;
  const inside = steps.filter((s) => s > x0 && s < x1);
  const at = [...new Set([x0, x1])].filter((s) => s >= steps[0] && s <= steps[last]);
  const wanted = [...inside, ...at].sort((a, b) => a - b);
  const value = (values) => wanted.map((s) => {
    const i = Math.min(Math.max(1, steps.findIndex((each) => each >= s)), last) || 0;
    if (!i) return values[0];
    const part = (s - steps[i - 1]) / (steps[i] - steps[i - 1]);
    return values[i - 1] + part * (values[i] - values[i - 1]);
  });
  return { steps: wanted, means: value(line.means), least: line.least && value(line.least), greatest: line.greatest && value(line.greatest) };
}

function draw(box, panel, height) {
  const isHeldOut = panel.kind === "val", isLog = $("log").checked, hasRaw = $("raw").checked;
  const lines = panel.lines.filter((line) => shown[line.run]);
  const all = lines.flatMap((line) => [line.steps[0], line.steps[line.steps.length - 1]]);
  const [x0, x1] = [Math.min(...all), Math.max(...all)];
  const width = isHeldOut ? 0 : (x1 - x0) * ($("smoothing").value / 100) ** 2 * 0.3;
  const curves = lines.map((line) => ({ line, bold: smooth(line.steps, line.means, width) }));
  const known = $("reference")?.checked && panel.reference && within(panel.reference, x0, x1);
  // The axis fits the curves and the reference's mean; of raw values what lies in the middle 98 %, so that one spike does not flatten the rest.
  const fitted = curves.flatMap(({ line, bold }) => [...bold, ...(hasRaw && !isHeldOut
    ? [quantile([...line.means], 0.01), quantile([...line.means], 0.99)] : [])]);
  if (known) fitted.push(...known.means);
  const usable = fitted.filter((v) => Number.isFinite(v) && (!isLog || v > 0));
  const svg = box.querySelector("svg"), WIDTH = Math.max(160, box.clientWidth - 16);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
  if (!usable.length) { svg.innerHTML = `<text x="${LEFT}" y="${height / 2}">no finite values</text>`; box.curves = []; return; }
  const scale = isLog ? Math.log10 : (v) => v;
  let low = scale(usable.reduce((a, b) => Math.min(a, b))), high = scale(usable.reduce((a, b) => Math.max(a, b)));
  const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  low -= margin; high += margin;
  const px = (s) => LEFT + (x1 > x0 ? (s - x0) / (x1 - x0) : 0.5) * (WIDTH - LEFT - RIGHT);
  const py = (v) => TOP + (high - scale(v)) / (high - low) * (height - TOP - BOTTOM);
  const path = (steps, values) => {
    let text = "", isDown = false;
    for (let i = 0; i < values.length; i++) {
      if (!Number.isFinite(values[i]) || (isLog && values[i] <= 0)) { isDown = false; continue; }
      text += `${isDown ? "L" : "M"}${px(steps[i]).toFixed(1)} ${py(values[i]).toFixed(1)}`;
      isDown = true;
    }
    return text;
  };
  const clip = `clip-${box.dataset.number}`;
  let inner = `<clipPath id="${clip}"><rect x="${LEFT}" y="0" width="${WIDTH - LEFT - RIGHT + 3}" height="${height - BOTTOM}"/></clipPath>`;
  for (const v of ticks(low, high, height > 150 ? 5 : 4)) {
    const y = TOP + (high - v) / (high - low) * (height - TOP - BOTTOM);
    inner += `<line class="axis" x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y}" y2="${y}"/>` +
      `<text x="${LEFT - 5}" y="${y + 4}" text-anchor="end">${short(isLog ? 10 ** v : v)}</text>`;
  }
  for (const s of ticks(x0, x1 > x0 ? x1 : x0 + 1, 4))
    if (s <= x1) inner += `<text x="${px(s)}" y="${height - 5}" text-anchor="middle">${short(s)}</text>`;
  inner += `<g clip-path="url(#${clip})">`;
  const band = (steps, least, greatest, style) => {
    const there = path(steps, greatest), back = path([...steps].reverse(), [...least].reverse());
    return there && back ? `<path class="band ${style}" d="${there}L${back.slice(1).replaceAll("M", "L")}Z"/>` : "";
  };
  if (known) inner += (known.least ? band(known.steps, known.least, known.greatest, "reference") : "") +
    `<path class="bold reference" d="${path(known.steps, known.means)}"/>`;
  for (const { line, bold } of curves) {
    const color = `v${data.runs[line.run].variant % 8}`;
    if (hasRaw && !isHeldOut) {
      if (line.least) inner += band(line.steps, line.least, line.greatest, color);
      inner += `<path class="raw ${color}" d="${path(line.steps, line.means)}"/>`;
    }
    inner += `<path class="bold ${color}" d="${path(line.steps, bold)}"/>`;
    if (line.steps.length < 40)
      for (let i = 0; i < bold.length; i++) if (Number.isFinite(bold[i]) && (!isLog || bold[i] > 0))
        inner += `<circle class="${color}" cx="${px(line.steps[i])}" cy="${py(bold[i])}" r="2"/>`;
  }
  svg.innerHTML = inner + "</g>";
  box.curves = curves;
  box.toStep = (x) => x0 + (x - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
  box.toX = px;
}

function point(box, event) {
  box.querySelector(".cursor")?.remove();
  box.querySelector(".tip")?.remove();
  const svg = box.querySelector("svg"), frame = svg.getBoundingClientRect();
  if (!event || !box.curves?.length) return;
  const step = box.toStep(event.clientX - frame.left);
  const rows = [];
  let at = null;
  for (const { line, bold } of box.curves) {
    let i = 0;
    while (i + 1 < line.steps.length && Math.abs(line.steps[i + 1] - step) <= Math.abs(line.steps[i] - step)) i++;
    at = at === null || Math.abs(line.steps[i] - step) < Math.abs(at - step) ? line.steps[i] : at;
    rows.push([line.run, bold[i], line.means[i]]);
  }
  const x = box.toX(at);
  svg.insertAdjacentHTML("beforeend", `<line class="cursor" x1="${x}" x2="${x}" y1="0" y2="${svg.viewBox.baseVal.height - BOTTOM}"/>`);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.append(`step ${Math.round(at)}`);
  for (const [run, bold, raw] of rows) {
    const row = document.createElement("div");
    row.className = `v${data.runs[run].variant % 8}`;
    row.textContent = `${data.runs[run].letter} ${short(bold)}${bold === raw ? "" : ` (raw ${short(raw)})`}`;
    tip.append(row);
  }
  box.append(tip);
  const left = x + 20 + tip.offsetWidth < box.clientWidth ? x + 20 : Math.max(0, x - tip.offsetWidth);
  tip.style.left = `${left}px`;
  tip.style.top = "34px";
}

const boxes = [];

function place(parent, panels, height, withKind) {
  for (const panel of panels) {
    const box = document.createElement("div");
    box.className = "panel";
    box.dataset.number = boxes.length;
    box.dataset.metric = panel.metric;
    const title = document.createElement("h4");
    title.textContent = panel.title + (withKind ? { val: ", held out", train: ", training" }[panel.kind] || "" : "");
    box.append(title);
    box.insertAdjacentHTML("beforeend", "<svg role='img'></svg>");
    box.querySelector("svg").setAttribute("aria-label", `${panel.metric} over steps`);
    parent.append(box);
    box.addEventListener("pointermove", (event) => point(box, event));
    box.addEventListener("pointerleave", () => point(box, null));
    boxes.push([box, panel, height]);
    draw(box, panel, height);
  }
}

function drop(parent) {
  for (let i = boxes.length - 1; i >= 0; i--) if (parent.contains(boxes[i][0])) boxes.splice(i, 1);
  parent.replaceChildren();
}

function rows(parent, panels, withKind) {
  for (const key of new Set(panels.map((p) => `${p.part}`))) {
    const title = document.createElement("h4");
    title.textContent = key;
    const grid = document.createElement("div");
    grid.className = "panels small";
    parent.append(title, grid);
    place(grid, panels.filter((p) => p.part === key), 170, withKind);
  }
}

function noise() {
  const kind = document.querySelector("[name=kind]:checked").value;
  drop($("noise"));
  const panels = data.panels.filter((p) => p.group === "noise" && p.kind === kind);
  rows($("noise"), panels, false);
  if (!panels.length) $("noise").textContent = "No run has logged losses by noise level here.";
}

function redraw() { for (const each of boxes) draw(...each); }

data.runs.forEach((run, index) => {
  const chip = document.createElement("button");
  chip.type = "button";
  chip.className = `chip v${run.variant % 8}`;
  chip.textContent = `${run.letter} ${run.name}`;
  chip.setAttribute("aria-pressed", "true");
  chip.addEventListener("click", () => {
    shown[index] = !shown[index];
    chip.setAttribute("aria-pressed", shown[index]);
    redraw();
  });
  $("runs").append(chip);
});
const parts = [...new Set(data.panels.filter((p) => p.group === "all").map((p) => p.part))];
place($("losses"), parts.flatMap((part) => ["val", "train"].flatMap((kind) =>
  data.panels.filter((p) => p.group === "all" && p.part === part && p.kind === kind))), 230, true);
if (!parts.length) $("losses").textContent = "No run has logged a loss yet.";
noise();
addEventListener("resize", redraw);
for (const id of ["smoothing", "raw", "log", "reference"]) $(id)?.addEventListener("input", redraw);
for (const each of document.querySelectorAll("[name=kind]")) each.addEventListener("change", noise);
$("more").addEventListener("toggle", () => {
  if ($("more").open && !$("rest").children.length)
    rows($("rest"), data.panels.filter((p) => ["subset", "task", "other"].includes(p.group)), true);
});

const media = [...document.querySelectorAll("video, audio")];

function hear(chosen) {
  for (const each of media) {
    each.muted = each !== chosen;
    each.closest("figure").querySelector(".hear").classList.toggle("on", each === chosen);
  }
}

for (const each of media) {
  each.addEventListener("error", () => {
    const note = document.createElement("p");
    note.className = "missing";
    note.textContent = "cannot be played: the folder “media” belongs beside this page";
    each.replaceWith(note);
  });
  // Without a seek some browsers show black until a clip is played.
  each.addEventListener("loadedmetadata", () => { if (!each.currentTime) each.currentTime = 0.001; });
  const mark = each.closest("figure").querySelector(".sound i");
  const follow = () => {
    if (mark && each.duration) mark.style.left = `${each.currentTime / each.duration * 100}%`;
    if (!each.paused) requestAnimationFrame(follow);
  };
  for (const moment of ["play", "timeupdate"]) each.addEventListener(moment, follow);
  each.closest("figure").querySelector(".hear").addEventListener("click", () => hear(each));
}
for (const button of document.querySelectorAll(".play")) button.addEventListener("click", () => {
  const own = [...button.closest(".clips").querySelectorAll("video, audio")];
  const isPlaying = own.some((each) => !each.paused);
  for (const each of media) each.pause();
  for (const other of document.querySelectorAll(".play")) other.textContent = "▶ Play all";
  if (isPlaying) return;
  button.textContent = "Pause";
  if (own.every((each) => each.muted) || own.every((each) => !each.muted)) hear(own[0]);
  for (const each of own) {
    each.currentTime = 0;
    each.play().catch(() => {});  // paused before it had begun
  }
});
