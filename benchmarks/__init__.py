"""Measurements behind every figure of the README: ``python -m benchmarks.<theme>`` writes ``benchmarks/results/``."""
