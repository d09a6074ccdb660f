"""The prior's log-probs: cache on disk with its key, and the pass that fills it."""
