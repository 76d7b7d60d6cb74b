"""Where kept entries live: ragged, in place, and in codes."""
