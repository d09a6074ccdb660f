"""Public formats to records, tokens and labels, and batches."""
