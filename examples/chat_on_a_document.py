"""Several turns about one document, all on the same pruned cache.

The document is read once. Each later turn feeds only its own tokens and prunes again.
`refreekv chat` does this, and more, in a terminal.
"""

import torch

import refreekv
from small_model import document, load, options

arguments = options("Several turns about one document, on the same pruned cache.").parse_args()
model, tokenizer = load(arguments.model)
policy = {"policy": refreekv.policies.parse(arguments.policy)} if arguments.policy else {}

questions = [f"{document()}\n\nWhat is this page about?", "Name one thing that it warns of.", "Say that in five words."]
cache = refreekv.ReFreeKVCache(model, **policy)
messages: list[dict[str, str]] = []
ids: list[int] = []  # of the whole conversation
answer = ""

for question in questions:
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # New is what the template writes behind the last answer; before it, the cache has it all.
    new = text.rpartition(answer)[2] if answer else text
    ids += tokenizer(new, add_special_tokens=False)["input_ids"]

    prompt = torch.tensor([ids], device=model.device)
    known = cache.get_seq_length()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
    )
    ids = output[0].tolist()
    if ids[-1] in tokenizer.all_special_ids:
        ids.pop()  # the template writes the end of an answer itself
    answer = tokenizer.decode(ids[prompt.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})

    print(f"Q: {question.splitlines()[-1]}")
    print(f"A: {answer.strip()}")
    print(f"   {prompt.shape[1] - known:,} of {prompt.shape[1]:,} tokens read; {str(cache.report).splitlines()[0]}\n")
