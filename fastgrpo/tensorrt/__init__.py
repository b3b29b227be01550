"""Reward networks as TensorRT engines."""
