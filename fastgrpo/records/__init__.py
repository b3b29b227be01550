"""What a run leaves behind: its directory, pictures, curves, progress line and summary."""
