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
