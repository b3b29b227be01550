"""What ranks tell each other, measured in real runs and worked out from first principles; how far that scales."""
