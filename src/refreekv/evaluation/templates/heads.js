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
