"""The Hydra configs, importable as ``fastgrpo_configs`` so that ``pkg://fastgrpo_configs`` finds them anywhere."""
