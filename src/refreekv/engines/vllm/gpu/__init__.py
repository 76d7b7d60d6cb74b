"""The worker on CUDA: kept entries in private blocks, read by a kernel of the project's own."""
