"""The learned distribution of start noise: its network, how that learns, and its files."""
