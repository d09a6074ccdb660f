"""The actor with the value head, log-probs and losses without full logits, and the self-check."""
