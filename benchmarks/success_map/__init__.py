"""Where a search pays, by how rarely the base model succeeds: ``python -m benchmarks.success_map``."""
