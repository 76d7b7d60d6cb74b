"""Policies side by side on one prompt: what each keeps, and where its answer leaves the full cache's.

One prompt says little. `refreekv eval` does this on many, with intervals and the worst family.
"""

import itertools

import refreekv
from small_model import document, load, options

parser = options("Policies side by side on one prompt.")
parser.add_argument("--policies", nargs="+", default=["refreekv", "snapkv:ratio=0.5", "streaming-llm:ratio=0.5"])
arguments = parser.parse_args()
model, tokenizer = load(arguments.model)

messages = [{"role": "user", "content": f"{document()}\n\nSummarize this page in one sentence."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt").to(
    model.device
)


def answer() -> list[int]:
    """The new tokens."""
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


full = answer()
policies = {spec: refreekv.policies.parse(spec) for spec in arguments.policies}
own = refreekv.policies.parse(arguments.policy) if arguments.policy else refreekv.ReFreeKVCache(model).policy
print(f"{'policy':32}{'kept':>8}{'K/V':>12}   first different token")
for name, policy in {arguments.policy or f"{own.name} (default)": own, **policies}.items():
    with refreekv.compress(model, policy) as kv:
        tokens = answer()
    pairs = enumerate(itertools.zip_longest(full, tokens))
    differs = next((f"{at + 1} of {len(full)}" for at, (one, other) in pairs if one != other), "none")
    held = f"{kv.report.bytes_after / 2**20:.1f} MiB"
    print(f"{name:32}{kv.report.budget:8.1%}{held:>12}   {differs}")
