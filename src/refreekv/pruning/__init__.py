"""From an attention call to the entries that stay: the policy's view, its answer, what is recorded of it."""
