"""What ``import fastgrpo`` offers: the commands as functions, whose results are objects in memory."""
