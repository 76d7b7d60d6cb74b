"""An out-of-tree vLLM plugin: blocks of evicted tokens go back to the pool.

Nothing here is imported with `refreekv`; vLLM loads what `launch.engine_arguments` names.
docs/vllm.md has the picture of how the parts work together.
"""
