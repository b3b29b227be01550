"""The state of a run on disk, and what it takes to go on with it exactly."""
