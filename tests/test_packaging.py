"""The wheel holds the code, the kernels, the configs and the embedded model, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fastgrpo", "kernels", "configs")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the sources, with the installed setuptools."""
    pytest.importorskip("setuptools", minversion="77", reason="building without isolation needs setuptools>=77")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, tree / name)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tree)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tree.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_kernels_alone_are_a_distribution_that_needs_nothing_of_fastgrpo(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building without isolation needs setuptools>=77")
    tree, installed = tmp_path / "tree", tmp_path / "installed"
    shutil.copytree(ROOT / "kernels", tree, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tree)], cwd=tree, capture_output=True, check=True)
    (wheel,) = tree.glob("fastgrpo_kernels-*-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    # the line by which the README has an installation tried
    (command,) = re.findall(r'^python -c "(.*)"$', (ROOT / "kernels/README.md").read_text(), flags=re.MULTILINE)
    program = f"{command}\nimport sys; print(fastgrpo_kernels.__file__, *sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *noise, last = done.stdout.splitlines()
    file, *modules = last.split()
    assert "tensor([[[" in noise[0]
    assert file == str(installed / "fastgrpo_kernels/__init__.py")
    assert not {"fastgrpo", "diffusers", "transformers", "hydra"} & {module.partition(".")[0] for module in modules}


def _files(directory: str, installed: str, pattern: str) -> set[str]:
    top = ROOT / directory
    return {f"{installed}/{path.relative_to(top)}" for path in top.rglob(pattern) if path.is_file()}


def test_wheel_holds_every_module_config_and_checkpoint_file(wheel_names: set[str]) -> None:
    expected = (
        _files("fastgrpo", "fastgrpo", "*.py")
        | _files("kernels/fastgrpo_kernels", "fastgrpo_kernels", "*.py")
        | _files("fastgrpo", "fastgrpo", "py.typed")
        | _files("kernels/fastgrpo_kernels", "fastgrpo_kernels", "py.typed")
        | _files("configs", "fastgrpo_configs", "*.yaml")
        | _files("fastgrpo/shapes/checkpoint", "fastgrpo/shapes/checkpoint", "*")
        | _files("fastgrpo/rewards/golden_set", "fastgrpo/rewards/golden_set", "*")
        | _files("fastgrpo/report", "fastgrpo/report", "page.*")
    )
    assert expected <= wheel_names, sorted(expected - wheel_names)


def test_wheel_installs_three_packages_and_no_other(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name}
    assert tops == {"fastgrpo", "fastgrpo_kernels", "fastgrpo_configs"}
