// The page: nodes, numbers, the tip and stored positions; then the text, its map and the answers.
const $ = (selector) => document.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// Texts become text nodes, attributes are set one by one: nothing is ever parsed as markup.
function build(namespace, name, attributes, children) {
  const node = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (key === "style") for (const [property, set] of Object.entries(value)) node.style.setProperty(property, set);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const html = (name, attributes = {}, ...children) => build("http://www.w3.org/1999/xhtml", name, attributes, children);
const svg = (name, attributes = {}, ...children) => build("http://www.w3.org/2000/svg", name, attributes, children);

const share = (value, digits = 1) => (value === null ? "–" : `${(100 * value).toFixed(digits)}%`);

const tip = $("#tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = event.target.getBoundingClientRect();
  const x = event.clientX || box.right, y = event.clientY || box.bottom;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 6))}px`;
  tip.style.top = `${y + 16 + tip.offsetHeight > innerHeight ? Math.max(4, y - tip.offsetHeight - 12) : y + 16}px`;
}
const hideTip = () => { tip.hidden = true; };
const tipped = (text) => ({
  onpointerenter: (event) => showTip(event, text),
  onpointermove: (event) => showTip(event, text),
  onpointerleave: hideTip,
  onfocus: (event) => showTip(event, text),
  onblur: hideTip,
});
addEventListener("scroll", hideTip, { passive: true });

// Runs (skip, keep, skip, keep, …) or a bit set in base64, to one byte a position.
function decode(encoded, length) {
  const kept = new Uint8Array(length);
  if (typeof encoded === "string") {
    const bits = atob(encoded);
    for (let at = 0; at < length; at++) kept[at] = (bits.charCodeAt(at >> 3) >> (at & 7)) & 1;
  } else {
    let at = 0;
    encoded.forEach((run, index) => {
      if (index % 2) kept.fill(1, at, at + run);
      at += run;
    });
  }
  return kept;
}
// Kept share by layer (across) and KV head (down), above it the mean of each layer.
function headsChart(kept, width) {
  const layers = kept.length, heads = kept[0].length;
  const left = 44, w = Math.max(280, width), cell = (w - left - 8) / layers, gap = cell > 8 ? 1.5 : 0.5;
  const side = Math.min(30, Math.max(13, cell)), bars = 64, top = bars + 8, bottom = top + heads * side;
  const chart = svg("svg", { viewBox: `0 0 ${w} ${bottom + 20}`, role: "img", "aria-label": "Kept share by layer and head" });
  const at = (layer) => left + layer * cell;
  for (const value of [0, 0.5, 1]) {
    const y = bars - value * (bars - 8);
    chart.append(svg("line", { class: "minor", x1: left, x2: w - 8, y1: y, y2: y }));
    chart.append(svg("text", { class: "soft", x: left - 6, y: y + 4, "text-anchor": "end" }, share(value, 0)));
  }
  kept.forEach((row, layer) => {
    const mean = row.reduce((sum, value) => sum + value, 0) / heads;
    const height = Math.max(0.5, mean * (bars - 8));
    chart.append(svg("rect", { class: "mean", x: at(layer) + gap / 2, y: bars - height, width: Math.max(0.5, cell - gap), height, rx: 1.5, ...tipped(`layer ${layer}: ${share(mean)} kept`) }));
    row.forEach((value, head) => {
      chart.append(svg("rect", {
        class: "heat", x: at(layer) + gap / 2, y: top + head * side, width: Math.max(0.5, cell - gap), height: side - gap, rx: 2,
        style: { "--v": `${100 * value}%` }, "data-v": value, ...tipped(`layer ${layer}, ${heads === 1 ? "all heads" : `head ${head}`}: ${share(value)} kept`),
      }));
    });
    const every = [1, 2, 5, 10, 20].find((step) => cell * step > 24) || 50;
    if (layer % every === 0) chart.append(svg("text", { class: "soft", x: at(layer) + cell / 2, y: bottom + 14, "text-anchor": "middle" }, layer));
  });
  for (let head = 0; head < heads; head++) {
    if (heads <= 10 || head % 5 === 0) {
      chart.append(svg("text", { class: "soft", x: left - 6, y: top + head * side + side / 2 + 4, "text-anchor": "end" }, heads === 1 ? "all" : head));
    }
  }
  chart.append(svg("text", { class: "soft", x: left - 6, y: bottom + 14, "text-anchor": "end" }, "layer"));
  return chart;
}
// A text whose tokens are shaded by what keeps them, and the map of all of its positions above it.
// `box` holds the text; `map` a canvas and an <i> that frames the part of it in sight.
function tokenText(box, map, describe) {
  const canvas = map.querySelector("canvas"), view = map.querySelector("i");
  let spans = []; // one a token of the text shown
  let shownText = null;

  function show(tokens) {
    if (shownText === tokens) return;
    shownText = tokens;
    spans = (tokens || []).map((token) => html("span", {}, token));
    box.replaceChildren(...spans);
    box.scrollTop = 0;
  }

  // `counts` of `most`, one a position: eight shades, and one for what nothing keeps.
  function shade(counts, most) {
    spans.forEach((span, at) => {
      span.className = counts[at] ? `k${Math.max(1, Math.round((8 * counts[at]) / most))}` : "off";
    });
  }

  // A row a layer, a column as many positions as fit into a pixel. `rows` hold a share for each
  // position; `only` is the one row that is not faded, or null.
  function draw(rows, length, only) {
    const style = getComputedStyle(document.documentElement);
    const [low, high] = ["--heat-lo", "--heat-hi"].map((name) => [1, 3, 5].map((at) => parseInt(style.getPropertyValue(name).trim().slice(at, at + 2), 16)));
    const columns = Math.max(1, Math.min(length, 1200)), image = new ImageData(columns, rows.length);
    const sums = new Float32Array(columns), sizes = new Float32Array(columns);
    for (let at = 0; at < length; at++) sizes[Math.floor((at * columns) / length)]++;
    rows.forEach((shares, row) => {
      sums.fill(0);
      shares.forEach((value, at) => { sums[Math.floor((at * columns) / length)] += value; });
      const strength = only === null || only === row ? 255 : 90;
      for (let column = 0; column < columns; column++) {
        const part = sums[column] / sizes[column], to = 4 * (row * columns + column);
        for (let c = 0; c < 3; c++) image.data[to + c] = low[c] + part * (high[c] - low[c]);
        image.data[to + 3] = strength;
      }
    });
    canvas.width = columns;
    canvas.height = rows.length;
    canvas.style.height = `${rows.length * (rows.length > 40 ? 3 : 5)}px`;
    canvas.getContext("2d").putImageData(image, 0, 0);
    frame();
  }

  // Around the part of the map whose text is in sight.
  function frame() {
    view.hidden = !spans.length || box.hidden;
    if (view.hidden) return;
    const first = (offset) => {
      let low = 0, high = spans.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (spans[middle].offsetTop + spans[middle].offsetHeight < offset) low = middle + 1;
        else high = middle;
      }
      return low;
    };
    const from = first(box.scrollTop + 4), to = first(box.scrollTop + box.clientHeight);
    view.style.left = `${(100 * from) / spans.length}%`;
    view.style.width = `${(100 * Math.max(1, to - from)) / spans.length}%`;
  }

  function scrollTo(at) {
    if (spans[at]) box.scrollTop = spans[at].offsetTop - box.clientHeight / 2;
  }

  box.addEventListener("scroll", frame, { passive: true });
  canvas.addEventListener("click", (event) => scrollTo(Math.floor((event.offsetX / canvas.clientWidth) * spans.length)));
  box.addEventListener("pointermove", (event) => {
    const at = event.target === box ? -1 : spans.indexOf(event.target);
    return at < 0 ? hideTip() : showTip(event, describe(at));
  });
  box.addEventListener("pointerleave", hideTip);
  return { show, shade, draw, frame, scrollTo };
}
// Two answers, and where they part.
function partAt(first, second) {
  let at = 0;
  while (at < first.length && at < second.length && first[at] === second[at]) at++;
  // From the start of the word, so that what is marked can be read; not far, as not all scripts have spaces.
  let start = at;
  while (start > 0 && at - start < 20 && /\S/.test(first[start - 1])) start--;
  if (start > 0 && /\S/.test(first[start - 1])) start = at;
  return start > 0 && /[\uD800-\uDBFF]/.test(first[start - 1]) ? start - 1 : start; // no half characters
}

function answer(text, other) {
  if (text === other) return html("p", { class: "answer" }, text);
  const at = partAt(text, other), word = /^\s*\S{0,40}/u.exec(text.slice(at))[0];
  const marked = html("mark", { title: "first difference" }, word || "∎ ends here");
  return html("p", { class: "answer" }, text.slice(0, at), marked, html("span", { class: "after" }, text.slice(at + word.length)));
}
// One prompt: the text, its map, and the two answers.
const data = JSON.parse(document.getElementById("data").textContent);
const length = data.tokens.length, layerChoice = $("#layer"), headChoice = $("#head");
// By layer and head, one byte a position; one entry where the heads of a layer are alike.
const kept = data.layers.map((layer) => layer.kept.map((encoded) => decode(encoded, length)));
const masks = (layer) => (headChoice.value === "all" ? kept[layer] : [kept[layer][Number(headChoice.value) % kept[layer].length]]);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
// Counted in heads where heads differ, so that a token's number is out of all layers and heads.
const weight = (layer) => (headChoice.value === "all" ? data.heads / kept[layer].length : 1);
let counts = [], most = 1;

const tokens = tokenText($("#text-tokens"), $("#text-map"), (at) => {
  const unit = data.heads === 1 || headChoice.value !== "all" ? "layer" : "layer and head";
  const of = unit === "layer" ? plural(most, "layer") : `${most.toLocaleString("en")} layers × heads`;
  return `token ${at.toLocaleString("en")} ${JSON.stringify(data.tokens[at])}: kept by ${counts[at]} of ${of}`;
});

// Sums over the chosen layers and heads.
function sum(layers) {
  const sums = new Float64Array(length);
  for (const layer of layers) for (const mask of masks(layer)) mask.forEach((value, at) => { sums[at] += value * weight(layer); });
  return sums;
}

// Rows of the map, a share for each position; they only change with the head.
let rows = [], rowsOf = null;
function mapRows() {
  if (rowsOf !== headChoice.value) {
    rowsOf = headChoice.value;
    const all = rowsOf === "all" ? data.heads : 1;
    rows = data.layers.map((_, layer) => sum([layer]).map((value) => value / all));
  }
  return rows;
}

function draw() {
  const chosen = Number(layerChoice.value), every = data.layers.map((_, at) => at);
  const layers = chosen === 0 ? every : [chosen - 1];
  counts = sum(layers);
  most = layers.length * (headChoice.value === "all" ? data.heads : 1);
  const total = counts.reduce((all, value) => all + value, 0), nowhere = counts.filter((value) => value === 0).length;
  $("#layer-name").textContent = chosen === 0 ? "all" : String(data.layers[chosen - 1].index);
  const who = headChoice.value === "all" ? "" : ` in KV head ${headChoice.value}`;
  const what = chosen === 0
    ? `A layer keeps ${share(total / (length * most))} of the ${plural(length, "token")} on average${who}; ${plural(nowhere, "token")} ${nowhere === 1 ? "is" : "are"} kept by none (grey).`
    : `Layer ${data.layers[chosen - 1].index} keeps ${share(total / (length * most))} of the ${plural(length, "token")}${who}.`;
  $("#text-note").textContent = `${what} The map has a row for each layer and the whole prompt from left to right; press it to go there.`;
  const reasons = chosen === 0 ? data.reasons : data.layers[chosen - 1].reasons;
  $("#reasons").replaceChildren($("#reasons").firstElementChild, ...Object.entries(reasons)
    .map(([name, part]) => html("span", {}, `${name} `, html("b", {}, share(part)))));
  tokens.shade(counts, most);
  tokens.draw(mapRows(), length, chosen === 0 ? null : chosen - 1);
  for (const row of $$("table.layers tbody tr")) row.classList.toggle("chosen", Number(row.dataset.layer) === chosen);
}

// Names of layers beside the map, and of positions below it.
function drawAxes() {
  const step = [1, 2, 4, 5, 8, 10, 16, 20, 25, 40].find((every) => data.layers.length / every <= 8) || 50;
  const names = data.layers.flatMap((layer, at) => (at % step === 0
    ? [html("span", { style: { top: `${(100 * (at + 0.5)) / data.layers.length}%` } }, layer.index)] : []));
  $("#map-layers").replaceChildren(html("span", { class: "title" }, String(data.layers.at(-1).index)), ...names);
  const wide = $("#text-map").clientWidth, count = Math.max(1, Math.min(8, Math.floor(wide / 90), length - 1));
  const marks = [...new Set(Array.from({ length: count + 1 }, (_, at) => Math.round((at * (length - 1)) / count)))];
  $("#map-positions").replaceChildren(...marks.map((at, index) => html("span", { style: { left: `${(100 * at) / length}%` } }, index === 0 ? `token ${at}` : at.toLocaleString("en"))));
  $("#map-positions").lastChild.style.left = "100%";
  if (data.heads > 1) $("#heads-chart").replaceChildren(headsChart(data.layers.map((layer) => layer.shares), $("#heads-chart").clientWidth));
}

$("#answer-full").replaceChildren(answer(data.full, data.compressed));
$("#answer-compressed").replaceChildren(answer(data.compressed, data.full));
tokens.show(data.tokens);
$("[data-fact=nowhere]").textContent = sum(data.layers.map((_, at) => at)).filter((value) => value === 0).length.toLocaleString("en");
layerChoice.addEventListener("input", draw);
headChoice.addEventListener("change", draw);
for (const button of $$("table.layers button")) {
  button.addEventListener("click", () => {
    layerChoice.value = button.closest("tr").dataset.layer;
    draw();
    $("#text").scrollIntoView();
  });
}
addEventListener("resize", () => { drawAxes(); tokens.frame(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("DOMContentLoaded", () => { drawAxes(); draw(); });
