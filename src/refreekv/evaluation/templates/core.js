// The report's state, its choosers, the tables. The other parts add to `redraw`.
const data = JSON.parse(document.getElementById("data").textContent);
const state = { model: 0, policy: 0, metric: "kl_mean" };
const redraw = []; // called after every change of `state`, with what changed
const model = () => data.models[state.model];
const policy = () => model().policies[state.policy];

function set(changes) {
  Object.assign(state, changes);
  for (const draw of redraw) draw(changes);
}

// Policy choosers: all show the same policy. The noise floor is only offered if there is nothing else.
function choices() {
  const all = model().policies.map((entry, index) => ({ ...entry, index }));
  return all.some((entry) => !entry.floor) ? all.filter((entry) => !entry.floor) : all;
}
const choosers = $$("select.policy");
for (const chooser of choosers) chooser.addEventListener("change", () => set({ policy: Number(chooser.value) }));
redraw.push((changes) => {
  if ("model" in changes) {
    $$(".model").forEach((node) => { node.hidden = Number(node.dataset.model) !== state.model; });
    for (const chooser of choosers) {
      chooser.replaceChildren(...choices().map((entry) => html("option", { value: entry.index }, entry.spec)));
    }
  }
  for (const chooser of choosers) chooser.value = state.policy;
});
$("#model").addEventListener("change", (event) => {
  state.model = Number(event.target.value);
  set({ model: state.model, policy: choices()[0].index });
});

// Tables: a tbody is a policy with its families, so sorting moves bodies.
for (const table of $$("table.sortable")) {
  const heads = $$(":scope > thead th", table);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (body) => body.rows[0].cells[column].dataset.v;
    const order = (first, second) => {
      const a = value(first), b = value(second);
      if (a === "" || b === "") return (a === "") - (b === ""); // what has no number stays last
      const sign = down ? -1 : 1;
      return sign * (column === 0 ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b));
    };
    table.append(...[...table.tBodies].sort(order));
  }));
  for (const button of $$(".expand", table)) {
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      button.closest("tbody").querySelector(".detail").hidden = open;
    });
  }
}

// Charts are drawn for the width they have.
let width = 0;
function fit() {
  const now = $("#frontier-chart").clientWidth;
  if (now && now !== width) {
    width = now;
    set({});
  }
}
addEventListener("resize", fit);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => set({}));
addEventListener("DOMContentLoaded", () => {
  width = $("#frontier-chart").clientWidth;
  set({ model: 0, policy: choices()[0].index });
});

// What each head keeps, of the policy chosen.
redraw.push(() => {
  const figure = $("#heads-chart"), note = $("#heads-note"), found = policy().heads;
  if (!found) {
    figure.replaceChildren();
    note.textContent = "What each head keeps was not recorded for this policy.";
    return;
  }
  const kept = found.kept;
  note.textContent = `Mean over ${found.n} sample${found.n === 1 ? "" : "s"}: ${kept.length} layers, `
    + (kept[0].length === 1 ? "all KV heads of a layer alike." : `${kept[0].length} KV heads.`);
  figure.replaceChildren(headsChart(kept, width));
});
