"""How layers hold their weights and how a pass over them is run; it knows nothing of the paper."""
