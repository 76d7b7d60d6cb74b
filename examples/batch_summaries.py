"""Summaries of documents of different length in one batch.

The batch is padded on the left, as always with `generate`; the cache is not: each document
keeps as much as it needs, and padding takes no room in what is kept.
"""

import refreekv
from small_model import document, load, options

arguments = options("Summaries of documents of different length in one batch.").parse_args()
model, tokenizer = load(arguments.model)
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
policy = {"policy": refreekv.policies.parse(arguments.policy)} if arguments.policy else {}

documents = [document(1_200), document(3_000, skip=2), document(5_000, skip=4)]
texts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text}\n\nSummarize this in one sentence."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    for text in documents
]
inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)

with refreekv.compress(model, **policy) as kv:
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)

answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for row, answer in enumerate(answers):
    layers = [layer.rows[row] for layer in kv.report.prunable]
    budget = sum(part.budget for part in layers) / len(layers)
    print(f"{layers[0].prompt_length:,} tokens, {budget:.0%} kept: {answer.strip()}")
print(f"\n{str(kv.report).splitlines()[0]}")
