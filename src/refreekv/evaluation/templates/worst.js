// The samples that suffer most, with both answers.
function fact(name, value) {
  return html("span", {}, `${name} `, html("b", {}, value));
}

function drawWorst() {
  const entry = policy(), list = entry.worst_samples;
  $("#worst-note").textContent = `By mean KL, of ${entry.n} sample${entry.n === 1 ? "" : "s"}. Both answers are free greedy runs; the first difference is marked.`;
  $("#worst-list").replaceChildren(...list.map((sample) => {
    const both = sample.text !== null && sample.text_full !== null;
    const same = both && sample.text === sample.text_full;
    return html("article", { class: "sample", "data-sample": sample.sample },
      html("h3", {}, `${sample.rank}. ${sample.family} `, html("small", {}, sample.sample)),
      html("p", { class: "facts-line" },
        fact("KL", nats(sample.kl_mean)), fact("largest", nats(sample.kl_max)), fact("top-1", share(sample.top1)),
        fact("first difference", sample.first_divergence === null ? "none" : `token ${sample.first_divergence}`),
        fact("budget", share(sample.budget)), fact("prompt", `${sample.prompt_tokens.toLocaleString("en")} tokens`)),
      both ? html("div", { class: "pair" },
        html("div", {}, html("h4", {}, "full cache"), answer(sample.text_full, sample.text)),
        html("div", {}, html("h4", {}, entry.label + (same ? " (the same answer)" : "")), answer(sample.text, sample.text_full)))
        : html("p", { class: "note" }, "No answers were recorded for this sample."),
      sample.prompt === null ? null : html("details", {}, html("summary", {}, "End of the prompt"), html("p", { class: "prompt" }, sample.prompt)));
  }));
}
redraw.push((changes) => { if ("model" in changes || "policy" in changes) drawWorst(); });
