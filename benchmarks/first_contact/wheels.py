"""What the steps import: this checkout, and those of the carried wheels that the machine lacks."""

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:
    # a bare Python has pip's own copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.specifiers import SpecifierSet  # type: ignore[assignment]

ROOT = Path(__file__).parents[2]
# import names whose directories are called otherwise, as in setup.py
_PACKAGES = {
    "fastgrpo": ROOT / "fastgrpo",
    "fastgrpo_kernels": ROOT / "kernels" / "fastgrpo_kernels",
    "fastgrpo_configs": ROOT / "configs",
}


def commit() -> str:
    """Of this checkout; "unknown" where it travelled without its history."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def link_packages(site: Path) -> None:
    """Make ``site`` a place from which this checkout is imported; to install it takes build tools, which may lack."""
    site.mkdir(parents=True, exist_ok=True)
    for name, directory in _PACKAGES.items():
        link = site / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(directory)
    # a run looks up its own version
    about = site / "fastgrpo-0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastgrpo\nVersion: {_project()['version']}\n")


def install(wheels: Path, site: Path) -> list[str]:
    """Install into ``site``, without network, the wheels that are needed; their names.

    A package that is there is left as it is if pyproject.toml takes its version.  ValueError if pip refuses.
    """
    if not wheels.is_dir():
        raise ValueError(f"--wheels {wheels} is no directory; README.md says how to fill one")
    needed = [wheel for wheel in sorted(wheels.glob("*.whl")) if unfit([distribution(wheel)])]
    if needed:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        result = subprocess.run(
            [*command, "--upgrade", "--target", str(site), *map(str, needed)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise ValueError(f"the wheels of {wheels} cannot be installed: {result.stderr.strip()}")
    return [distribution(wheel) for wheel in needed]


def distribution(wheel: Path) -> str:
    return normal(wheel.name.split("-")[0])


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def unfit(names: Iterable[str]) -> dict[str, str]:
    """Those of the distributions that are not installed, or not in a version of pyproject.toml's: name -> why."""
    found = {}
    for name in names:
        try:
            installed = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
            continue
        if name in (ranges := _ranges()) and installed not in ranges[name]:
            found[name] = f"{installed}, not {ranges[name]}"
    return found


def _ranges() -> dict[str, SpecifierSet]:
    project = _project()
    requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return {normal(one.name): one.specifier for one in map(Requirement, requirements)}


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project
