"""The six choices that make an algorithm: schedule, noise, dynamics, timesteps, advantage, objective."""
