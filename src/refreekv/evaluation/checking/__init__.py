"""Whether a model takes a compressed cache, and how likely it hurts: `check` and `calibrate`."""
