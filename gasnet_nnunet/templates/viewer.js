"use strict";
const data = JSON.parse(document.getElementById("volume").textContent);
const [depth, height, width] = data.shape;
const panels = [...document.querySelectorAll("canvas[data-panel]")];
const byId = (id) => document.getElementById(id);
const COLOURS = ["#ffd600", "#00d5ff", "#ff6ad5", "#7dff5c", "#ff9a3d"];
const state = { slice: data.start, level: 0, window: 1, preset: "", contour: true, cursor: null };

// Slices ------------------------------------------------------------------------------------------------------------
const cache = new Map();

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const codes = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const left = x ? codes[i - 1] : 0, up = y ? codes[i - width] : 0, corner = x && y ? codes[i - width - 1] : 0;
      codes[i] += Math.max(Math.min(left, up), Math.min(Math.max(left, up), left + up - corner));
    }
  }
  return codes;
}

async function load(number) {
  if (!cache.has(number)) {
    if (cache.size > 60) cache.delete(cache.keys().next().value);
    cache.set(number, (async () => {
      const names = Object.keys(data.planes);
      const planes = await Promise.all(names.map((name) => unpack(data.planes[name][number])));
      const slice = Object.fromEntries(names.map((name, i) => [name, planes[i]]));
      if (slice.restored) slice.restored.forEach((change, i) => { slice.restored[i] = change + slice.ct[i]; });
      slice.outlines = outlines(slice.mask);
      return slice;
    })());
  }
  return cache.get(number);
}

// The edges between pixels of different labels, a path for each label.
function outlines(mask) {
  const paths = new Map();
  const path = (label) => paths.get(label) || paths.set(label, new Path2D()).get(label);
  const edge = (label, other, x0, y0, x1, y1) => {
    if (label && label !== other) { path(label).moveTo(x0, y0); path(label).lineTo(x1, y1); }
  };
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const label = mask[i];
      if (!label) continue;
      edge(label, x ? mask[i - 1] : 0, x, y, x, y + 1);
      edge(label, x + 1 < width ? mask[i + 1] : 0, x + 1, y, x + 1, y + 1);
      edge(label, y ? mask[i - width] : 0, x, y, x + 1, y);
      edge(label, y + 1 < height ? mask[i + width] : 0, x, y + 1, x + 1, y + 1);
    }
  }
  return paths;
}

// Pictures ----------------------------------------------------------------------------------------------------------
const picture = new OffscreenCanvas(width, height);
const pencil = picture.getContext("2d");
const pixels = pencil.createImageData(width, height);
const words = new Uint32Array(pixels.data.buffer);

function greys() {
  const low = state.level - state.window / 2;
  return data.levels.map((level) => Math.max(0, Math.min(255, Math.round((level - low) / state.window * 255))));
}

function fill(name, slice, grey) {
  if (name === "difference") {
    // Denser than restored in orange, less dense in blue, over the CT at half its brightness.
    const shares = data.differenceLevels.map((level) => Math.min(1, Math.abs(level) / 400));
    for (let i = 0; i < words.length; i++) {
      const code = slice.difference[i], share = shares[code], base = grey[slice.ct[i]] * 0.5 * (1 - share);
      const [r, g, b] = data.differenceLevels[code] > 0 ? [255, 138, 0] : [64, 156, 255];
      words[i] = 0xff000000 | (base + b * share) << 16 | (base + g * share) << 8 | (base + r * share);
    }
  } else {
    const codes = name === "restored" ? slice.restored : slice.ct;
    for (let i = 0; i < words.length; i++) words[i] = 0xff000000 | grey[codes[i]] * 0x010101;
  }
  pencil.putImageData(pixels, 0, 0);
}

function draw(canvas, slice, grey) {
  const ratio = canvas.height / height, across = canvas.width / width;
  const fine = canvas.width / Math.max(1, canvas.clientWidth);
  const context = canvas.getContext("2d");
  fill(canvas.dataset.panel, slice, grey);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (canvas.dataset.panel === "contour" && state.contour) {
    for (const [label, path] of slice.outlines) {
      const scaled = new Path2D();
      scaled.addPath(path, new DOMMatrix([across, 0, 0, ratio, 0, 0]));
      // A dark rim keeps the line in sight on white tissue.
      for (const [colour, wide] of [["#0008", 3], [COLOURS[(label - 1) % COLOURS.length], 1.4]]) {
        context.lineWidth = wide * fine;
        context.strokeStyle = colour;
        context.stroke(scaled);
      }
    }
  }
  if (state.cursor) {
    const x = (state.cursor.x + 0.5) * across, y = (state.cursor.y + 0.5) * ratio;
    context.strokeStyle = "#7dff5c";
    context.lineWidth = fine;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * fine * dx, y + 4 * fine * dy);
      context.lineTo(x + 11 * fine * dx, y + 11 * fine * dy);
    }
    context.stroke();
  }
  context.font = `600 ${13 * fine}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  context.fillStyle = "#fff";
  context.strokeStyle = "#000";
  context.lineWidth = 3 * fine;
  for (const [side, x] of [["R", 4 * fine], ["L", canvas.width - 14 * fine]]) {
    context.strokeText(side, x, canvas.height / 2);
    context.fillText(side, x, canvas.height / 2);
  }
}

async function show() {
  const number = state.slice;
  const slice = await load(number);
  if (number !== state.slice) return;
  const grey = greys();
  for (const canvas of panels) {
    draw(canvas, slice, grey);
    canvas.setAttribute("aria-label", `${canvas.dataset.caption}, slice ${number + 1} of ${depth}, ` +
      `${state.preset || "free"} window`);
  }
  const position = data.top - number * data.spacing[0];
  byId("where").textContent = `Slice ${number + 1} of ${depth} (${position.toFixed(0)} mm)`;
  byId("slider").value = number;
  byId("profile-mark").style.left = `${100 * (number + 0.5) / depth}%`;
  readOut(slice);
  document.body.dataset.shown = [number, state.level, state.window, state.contour].join(" ");
  if (number + 1 < depth) load(number + 1);
}

function readOut(slice) {
  const cursor = state.cursor;
  if (!cursor) { byId("value").textContent = ""; return; }
  const i = cursor.y * width + cursor.x;
  const value = (codes) => `${Math.round(data.levels[codes[i]])} ${data.unit}`;
  let text = value(slice.ct);
  if (slice.restored) text += `, restored ${value(slice.restored)}`;
  if (slice.difference) text += `, difference ${Math.round(data.differenceLevels[slice.difference[i]])} ${data.unit}`;
  byId("value").textContent = text;
}

// Controls ----------------------------------------------------------------------------------------------------------
function go(number) {
  state.slice = Math.max(0, Math.min(depth - 1, number));
  show();
}

function setWindow(level, extent, preset = "") {
  Object.assign(state, { level, window: Math.max(1, extent), preset });
  byId("level").value = Math.round(state.level);
  byId("width").value = Math.round(state.window);
  for (const button of document.querySelectorAll("[data-window]")) {
    button.setAttribute("aria-pressed", String(button.dataset.window === preset));
  }
  show();
}

function choose(name) {
  if (data.windows[name]) setWindow(...data.windows[name], name);
  else {
    const low = data.levels[0], high = data.levels[255];
    setWindow((low + high) / 2, high - low, "Full");
  }
}

function setContour(on) {
  state.contour = on;
  byId("contour").checked = on;
  show();
}

for (const button of document.querySelectorAll("[data-window]")) {
  button.addEventListener("click", () => choose(button.dataset.window));
}
for (const id of ["level", "width"]) {
  byId(id).addEventListener("change", () => setWindow(Number(byId("level").value), Number(byId("width").value)));
}
byId("contour").addEventListener("change", (event) => setContour(event.target.checked));
byId("slider").addEventListener("input", (event) => go(Number(event.target.value)));

let travelled = 0;
let drag = null;
for (const canvas of panels) {
  canvas.width = Math.max(640, width);
  canvas.height = Math.round(canvas.width * height * data.spacing[1] / (width * data.spacing[2]));
  canvas.addEventListener("wheel", (event) => {
    if (event.ctrlKey) return;
    event.preventDefault();
    // A notch of a wheel is a slice; a touchpad sends many small steps instead.
    travelled += Math.max(-40, Math.min(40, event.deltaMode ? event.deltaY * 40 : event.deltaY));
    const steps = Math.trunc(travelled / 40);
    travelled -= 40 * steps;
    if (steps) go(state.slice + steps);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drag = { x: event.clientX, y: event.clientY, level: state.level, window: state.window };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      setWindow(drag.level + 2 * (event.clientY - drag.y), drag.window + 4 * (event.clientX - drag.x));
      return;
    }
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * width);
    const y = Math.floor((event.clientY - box.top) / box.height * height);
    state.cursor = x >= 0 && y >= 0 && x < width && y < height ? { x, y } : null;
    show();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { drag = null; });
  canvas.addEventListener("pointerleave", () => { state.cursor = null; show(); });
  canvas.addEventListener("dblclick", () => enlarge(canvas.closest("figure")));
}

function enlarge(figure) {
  const viewer = byId("viewer");
  const alone = figure.classList.toggle("alone");
  for (const other of viewer.querySelectorAll("figure")) if (other !== figure) other.classList.remove("alone");
  viewer.classList.toggle("one", alone);
  for (const button of viewer.querySelectorAll("[data-enlarge]")) {
    button.setAttribute("aria-pressed", String(button.closest("figure").classList.contains("alone")));
  }
  show();
}
for (const button of document.querySelectorAll("[data-enlarge]")) {
  button.addEventListener("click", () => enlarge(button.closest("figure")));
}

const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -depth, End: depth };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === "number") return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const preset = Object.keys(data.windows).find((name) => name[0].toLowerCase() === key);
  if (key in steps) go(state.slice + steps[key]);
  else if (key === "c") setContour(!state.contour);
  else if (preset) choose(preset);
  else return;
  event.preventDefault();
});
window.addEventListener("resize", show);

// The bars over the slider: how much lesion each slice holds.
const bars = byId("profile");
bars.width = depth;
bars.height = 24;
const most = Math.max(1, ...data.areas);
bars.getContext("2d").fillStyle = "#e08a00";
data.areas.forEach((area, i) => {
  const tall = area ? Math.max(2, Math.round(24 * area / most)) : 0;
  bars.getContext("2d").fillRect(i, 24 - tall, 1, tall);
});
bars.addEventListener("click", (event) => {
  const box = bars.getBoundingClientRect();
  go(Math.floor((event.clientX - box.left) / box.width * depth));
});

if (typeof DecompressionStream === "undefined") {
  byId("where").textContent = "The slices need a browser of 2023 or later.";
} else {
  byId("still").hidden = true;
  byId("viewer").hidden = false;
  choose(Object.keys(data.windows)[0]);
}
