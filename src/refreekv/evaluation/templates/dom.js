// Small helpers that all pages share: nodes, numbers, the tip, the form in which positions are stored.
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
function nats(value) {
  if (value === null) return "not a finite number";
  if (value === 0) return "0";
  return Math.abs(value) >= 1e-4 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

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
