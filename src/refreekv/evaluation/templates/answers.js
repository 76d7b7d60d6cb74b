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
