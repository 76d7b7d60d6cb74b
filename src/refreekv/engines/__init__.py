"""Where the method meets an inference engine."""

DEFAULT_POLICY = "adaptive"
"""The policy where none is named. Here, where reading it imports nothing else."""
