"""Time to reward, ours beside Flow-GRPO's and DiffusionNFT's code: ``python -m benchmarks.time_to_reward``."""
