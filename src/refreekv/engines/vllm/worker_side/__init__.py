"""The part of the plugin that lives in vLLM's workers."""
