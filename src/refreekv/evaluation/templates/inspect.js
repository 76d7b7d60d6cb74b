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
