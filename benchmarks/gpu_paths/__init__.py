"""Does every path that CUDA takes run?  ``python -m benchmarks.gpu_paths``."""
