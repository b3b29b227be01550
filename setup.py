"""The mapping that pyproject.toml cannot state: two import names whose directories are called otherwise."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastgrpo", "fastgrpo.*"]), "fastgrpo_kernels", "fastgrpo_configs"],
    package_dir={"fastgrpo_kernels": "kernels/fastgrpo_kernels", "fastgrpo_configs": "configs"},
)
