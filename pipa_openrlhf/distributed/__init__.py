"""OpenRLHF's DeepSpeed strategy on CPU and CUDA; the one place that imports OpenRLHF."""
