"""Inside a `transformers` pipeline, which knows nothing of it."""

from transformers import pipeline

import refreekv
from small_model import document, load, options

arguments = options("Inside a transformers pipeline.").parse_args()
model, tokenizer = load(arguments.model)
policy = {"policy": refreekv.policies.parse(arguments.policy)} if arguments.policy else {}

pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)  # made before or within, as you like
messages = [{"role": "user", "content": f"{document(4_000)}\n\nWhat is this page about? Answer in one sentence."}]

with refreekv.compress(model, **policy) as kv:
    [result] = pipe(messages, max_new_tokens=arguments.max_new_tokens, do_sample=False)

print(result["generated_text"][-1]["content"].strip())
print(f"\n{str(kv.report).splitlines()[0]}")
