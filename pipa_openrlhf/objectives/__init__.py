"""One file a family of objectives, and the loss of a batch."""
