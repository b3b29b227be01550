"""Who may import what: the layers of the package, and the one place of each third party."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {
    "prompts",
    "start_noise",
    "batches",
    "memory_plan",
    "memory_stages",
    "rollout",
    "update",
    "evaluate",
    "train_state",
    "checkpoint",
    "metrics",
    "health",
    "record",
}
PIECES = {"algorithm", "models", "rewards", "runtime", "records"}
BELOW_STAGES = PIECES | {"types"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "private_directory": set(),
    "shapes": set(),
    "algorithm": {"types"},
    "models": {"types", "private_directory"},
    "rewards": {"types", "shapes", "runtime"},
    "runtime": {"types", "private_directory"},
    "records": {"types"},
    **dict.fromkeys(STAGES, STAGES | BELOW_STAGES),
    "trainer": STAGES | BELOW_STAGES,
    "config": set(),
    "model_on_device": STAGES | BELOW_STAGES | {"config"},
    "same_run": STAGES | BELOW_STAGES,
    # the command, where the module is run by torchrun
    "train": STAGES | BELOW_STAGES | {"trainer", "model_on_device", "same_run", "config", "cli"},
    "commands": STAGES | BELOW_STAGES | {"trainer", "train", "model_on_device", "config", "shapes"},
    "cli": STAGES | BELOW_STAGES | {"trainer", "config", "train", "commands"},
}
CONFINED = {
    # submitit is started by Hydra's launcher
    "hydra": ("fastgrpo/config.py", "fastgrpo/commands/submit.py"),
    "hydra_plugins": ("fastgrpo/commands/submit.py",),
    "submitit": ("fastgrpo/commands/submit.py",),
    "omegaconf": (
        "fastgrpo/cli.py",
        "fastgrpo/config.py",
        "fastgrpo/train.py",
        "fastgrpo/model_on_device.py",
        "fastgrpo/same_run.py",
        "fastgrpo/commands/",
    ),
    "diffusers": ("fastgrpo/models/", "fastgrpo/shapes/pretrain/"),
    "transformers": ("fastgrpo/models/", "fastgrpo/rewards/", "fastgrpo/shapes/pretrain/"),
    "flash_attn": ("fastgrpo/models/attention.py",),
    "flash_attn_interface": ("fastgrpo/models/attention.py",),
    "xformers": ("fastgrpo/models/attention.py",),
    "torch_tensorrt": ("fastgrpo/runtime/tensorrt",),
    "tensorrt": ("fastgrpo/runtime/tensorrt",),
    "tensorrt_rtx": ("fastgrpo/runtime/tensorrt",),
    "onnx": ("fastgrpo/runtime/tensorrt",),
    "ImageReward": ("fastgrpo/rewards/image_reward.py",),
    "rapidocr": ("fastgrpo/rewards/ocr.py",),
    "rapidfuzz": ("fastgrpo/rewards/ocr.py",),
    "requests": ("fastgrpo/rewards/remote/",),
    "fastapi": ("fastgrpo/rewards/remote/",),
    "uvicorn": ("fastgrpo/commands/serve_reward.py",),
    "huggingface_hub": ("fastgrpo/rewards/networks/checkpoints.py", "fastgrpo/models/quiet.py"),
    "triton": ("kernels/",),
    "fastgrpo_kernels": (
        "kernels/",
        "fastgrpo/algorithm/",
        "fastgrpo/models/",
        "fastgrpo/rewards/",
        "fastgrpo/rollout.py",
        "fastgrpo/update.py",
    ),
}
KERNELS_MAY_IMPORT = {"torch", "triton", "fastgrpo_kernels", *sys.stdlib_module_names}
FILES = [path.relative_to(ROOT) for top in ("fastgrpo", "kernels") for path in sorted((ROOT / top).rglob("*.py"))]


def imported_modules(source: str) -> Iterator[str]:
    """Every module that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            # "from fastgrpo import rollout" imports fastgrpo.rollout
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    name = path.parts[1].removesuffix(".py")
    for module in imported_modules((ROOT / path).read_text()):
        top, *rest = module.split(".")
        allowed = CONFINED.get(top)
        assert allowed is None or str(path).startswith(allowed), f"{path} imports {module}: only {allowed} may"
        if path.parts[0] == "kernels":
            assert top in KERNELS_MAY_IMPORT, f"{path} imports {module}: kernels need torch and triton only"
        elif top == "fastgrpo" and name != "__init__":
            assert rest, f"{path}: import what you need from fastgrpo, by name"
            assert rest[0] in MAY_IMPORT[name] | {name}, f"{path} imports {module}: {name} may not import {rest[0]}"
            if name in {"rollout", "update"} and rest[0] == "models":
                assert rest[1] == "adapter", f"{path} imports {module}: {name} sees a model only as the adapter"


def test_every_module_of_the_package_has_a_layer() -> None:
    modules = {path.parts[1].removesuffix(".py") for path in FILES if path.parts[0] == "fastgrpo"}
    assert modules - {"__init__"} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_pickle_crosses_a_network(path: Path) -> None:
    names = {node.attr for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Attribute)}
    collectives_of_objects = {name for name in names if name.endswith(("_object", "_object_list"))}
    assert not collectives_of_objects, f"{path} uses {collectives_of_objects}, which unpickle what others send"
