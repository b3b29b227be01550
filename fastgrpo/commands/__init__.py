"""What each command of the console script runs."""
