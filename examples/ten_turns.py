"""Ten questions about one document, each read over all of it.

What a turn evicts goes to host memory in 8 bits, and comes back when the next question begins; while an answer is
generated, the device holds what the policy keeps. On a GPU `refreekv chat` does this by itself. On a CPU it saves no
memory unless it goes to a folder, as here: the host is the device.
"""

import tempfile

import torch

import refreekv
from small_model import document, load, options

arguments = options("Ten questions about one document, each read over all of it.").parse_args()
model, tokenizer = load(arguments.model)
policy = {"policy": refreekv.policies.parse(arguments.policy)} if arguments.policy else {}

questions = [
    "What is this page about?",
    "What happens when a module is imported for the first time?",
    "What is a finder?",
    "What is the difference between a module and a package?",
    "What is written about namespace packages?",
    "Where does Python look for modules?",
    "What is a loader?",
    "When is a ModuleNotFoundError raised?",
    "What is the import statement made of?",
    "Which of all this should a beginner read first?",
]
with tempfile.TemporaryDirectory() as folder:
    # A GPU's conversations stay in host memory as long as there is room, and go to the folder then.
    cache = refreekv.ReFreeKVCache(model, **policy, keep_evicted=f"host:folder={folder}")
    ids: list[int] = []  # of the whole conversation
    for number, question in enumerate(questions):
        text = f"{document()}\n\n" if number == 0 else "\n\n"
        ids += tokenizer(f"{text}Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
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
            ids.pop()  # the next question follows the answer's text
        print(f"Q: {question}")
        print(f"A: {tokenizer.decode(ids[prompt.shape[1] :], skip_special_tokens=True).strip()}")
        print(f"   {prompt.shape[1] - known:,} of {prompt.shape[1]:,} tokens read; {str(cache.report).splitlines()[0]}")
        print(f"   for the next turn: {cache.report.remembered}\n")
