"""Our iteration beside Flow-GRPO's own functions, on one model: ``python -m benchmarks.flow_grpo --checkout PATH``."""
