"""What the benchmark calls of a checkout of flow_grpo, written anew: its names, arguments and results, in small."""
