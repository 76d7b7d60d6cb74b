"""Inside a LangChain chain, by its Hugging Face wrapper (pip install 'refreekv[examples]')."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_huggingface import HuggingFacePipeline
from transformers import pipeline

import refreekv
from small_model import document, load, options

arguments = options("Inside a LangChain chain.").parse_args()
model, tokenizer = load(arguments.model)
policy = {"policy": refreekv.policies.parse(arguments.policy)} if arguments.policy else {}

pipe = pipeline(
    "text-generation",
    model=model,
    tokenizer=tokenizer,
    max_new_tokens=arguments.max_new_tokens,
    do_sample=False,
    return_full_text=False,
)
prompt = PromptTemplate.from_template("{page}\n\nQuestion: {question}\nAnswer:")
chain = prompt | HuggingFacePipeline(pipeline=pipe) | StrOutputParser()

with refreekv.compress(model, **policy) as kv:
    print(chain.invoke({"page": document(4_000), "question": "What is a module?"}).strip())

print(f"\n{str(kv.report).splitlines()[0]}")
