"""Run, the one trainer, checkpoints, export and the identity of a run."""
