"""How often the base model draws a caption right, and what learns where that is seldom."""
