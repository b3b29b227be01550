"""How much fits on a device, and the batches that follow."""
