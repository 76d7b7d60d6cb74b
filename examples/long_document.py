"""Ask questions about one long document, with a pruned cache.

What is refreekv in it are three lines: the import, the ``with``, the report.
"""

from pathlib import Path

import refreekv
from small_model import document, load, options

parser = options("Ask questions about one long document.")
parser.add_argument("--document", type=Path, help="a text file; default: pages of Python's documentation")
parser.add_argument("--question", action="append", help="may be given several times")
arguments = parser.parse_args()

text = arguments.document.read_text(encoding="utf-8") if arguments.document else document()
questions = arguments.question or ["What does the import statement do?", "What is a block?"]
model, tokenizer = load(arguments.model)
policy = {"policy": refreekv.policies.parse(arguments.policy)} if arguments.policy else {}

for question in questions:
    messages = [{"role": "user", "content": f"{text}\n\nQuestion: {question}\nAnswer in one sentence."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)

    with refreekv.compress(model, **policy) as kv:
        output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)

    print(f"Q: {question}")
    print(f"A: {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True).strip()}")
    print(f"   {str(kv.report).splitlines()[0]}\n")
