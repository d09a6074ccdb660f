"""One file an entry point, and the parsers of configs."""
