"""What network evaluations buy at sampling: ``python -m benchmarks.search_at_sampling``."""
