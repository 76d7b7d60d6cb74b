// What is kept, over the text itself: each token shaded by how many layers keep it.
const sampleChoice = $("#text-sample"), layerChoice = $("#text-layer"), textBox = $("#text-tokens"), mapBox = $("#text-map");
const current = () => model().texts[Number(sampleChoice.value)];
let counts = [];
const tokens = tokenText(textBox, mapBox, (at) => {
  const layers = Number(layerChoice.value) === 0 ? Number(layerChoice.max) : 1;
  return `token ${at}: kept by ${counts[at]} of ${layers} layer${layers === 1 ? "" : "s"}`;
});

function drawText(changes) {
  const texts = model().texts, note = $("#text-note");
  if ("model" in changes) {
    sampleChoice.replaceChildren(...texts.map((text, index) => html("option", { value: index }, `${text.family} · ${text.sample}`)));
    tokens.show(null);
  }
  const text = current(), encoded = text && text.kept[state.policy];
  layerChoice.disabled = !encoded;
  mapBox.hidden = !encoded;
  textBox.hidden = !(encoded && text.tokens);
  if (!encoded) {
    const others = text ? Object.keys(text.kept).map((index) => model().policies[index].spec) : [];
    note.textContent = text ? `Kept positions were not recorded for this policy and sample; they were for: ${others.join(", ")}.` : "No sample was picked for display in this run.";
    counts = [];
    return;
  }
  layerChoice.max = encoded.length;
  const layer = Math.min(Number(layerChoice.value), encoded.length);
  layerChoice.value = layer;
  $("#text-layer-name").textContent = layer === 0 ? "all" : String(layer - 1);
  tokens.show(text.tokens);
  const kept = encoded.map((entry) => decode(entry, text.n));
  const shown = layer === 0 ? kept : [kept[layer - 1]];
  counts = new Array(text.n).fill(0);
  for (const mask of shown) mask.forEach((value, at) => { counts[at] += value; });
  tokens.shade(counts, shown.length);
  const total = counts.reduce((sum, value) => sum + value, 0), nowhere = counts.filter((value) => value === 0).length;
  note.textContent = (layer === 0
    ? `${text.n.toLocaleString("en")} tokens, on average ${share(total / (text.n * shown.length))} kept by a layer; ${nowhere.toLocaleString("en")} kept by none (grey). A layer keeps a token if any of its heads does. The stronger the colour, the more layers keep a token.`
    : `Layer ${layer - 1} keeps ${total.toLocaleString("en")} of ${text.n.toLocaleString("en")} tokens (${share(total / text.n)}).`)
    + (text.tokens ? " The map shows the whole text from left to right, a row a layer; press it to go there." : " The tokens' texts were not recorded.");
  tokens.draw(kept, text.n, layer === 0 ? null : layer - 1);
}

sampleChoice.addEventListener("change", () => set({}));
layerChoice.addEventListener("input", () => drawText({}));
redraw.push(drawText);
