"""Answering with a pruned cache, for the chat in the terminal and for a local OpenAI-compatible server."""
