"""Labels of the steps of sampled answers."""
