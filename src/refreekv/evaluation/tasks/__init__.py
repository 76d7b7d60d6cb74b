"""Task scores through lm-eval, with full and with physically pruned caches."""
