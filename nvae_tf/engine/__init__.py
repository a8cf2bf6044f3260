"""How layers hold their weights and how a pass over them is run. Knows nothing of the paper."""
