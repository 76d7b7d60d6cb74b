"""What a model takes in memory before it runs: weights, K/V, what fits, and what a load needs."""
