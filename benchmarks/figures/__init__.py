"""What the READMEs say in figures, written into them from the result files: ``python -m benchmarks.figures``."""
