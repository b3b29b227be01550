"""``fastgrpo report``: what runs measured, drew and cost, as one HTML page."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fastgrpo.report.page import write_report


def report(config: DictConfig) -> Path:
    """Run a checked ``report`` config; returns the page that it wrote."""
    runs = OmegaConf.to_container(config.run) if OmegaConf.is_list(config.run) else [config.run]
    if not isinstance(runs, list) or not all(isinstance(run, str | int) for run in runs):
        raise ValueError(f"run must be a directory or a list of them, got {config.run}; give run=outputs/NAME")
    directories = [Path(str(run)).expanduser() for run in runs if run != ""]
    return write_report(directories, Path(config.output) if config.output else None)
