"""Who may import what: the layers of the package, and the one place of each third party."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# each floor, and the floors below it that it may import from; rooms of one line may not see each other
_PLAIN = {"files", "types", "resolution", "settings", "learning_rate"}
_PLAIN |= {"device_error", "out_of_memory", "numerics", "on_device", "own_code", "leaves", "loading"}
_PIECES = _PLAIN | {"algorithm", "models", "compile"}
_CARRIED = _PIECES | {"profiling", "distributed", "rewards", "memory"}
_LINE = _CARRIED | {"prompts", "prompt_files", "sampler", "search_portion", "image_search", "prompt_images"}
_LINE |= {"start_noise", "step_noise", "rollout", "replay", "update", "evaluation", "ema"}
_LINE |= {"proposal", "retry", "old_policy", "health", "step_replay", "image_replay", "signals"}
_RUN = _LINE | {"checkpoints", "records", "trainer"}
_SEE_AN_ADAPTER = {
    "sampler",
    "search_portion",
    "image_search",
    "prompt_images",
    "rollout",
    "step_replay",
    "image_replay",
    "update",
}
_FACE = {"composing", "config", "mistakes", "overrides", "pieces", "parts", "given", "known_warnings"}
MAY_IMPORT: dict[str, set[str]] = {
    "own_code": set(),
    "files": set(),
    "types": {"resolution"},
    "resolution": set(),
    "learning_rate": set(),
    "device_error": {"out_of_memory"},
    "out_of_memory": set(),
    "numerics": set(),
    "on_device": set(),
    "loading": set(),
    "settings": {"learning_rate"},
    "shapes": set(),
    **dict.fromkeys(("algorithm", "models", "compile"), _PLAIN),
    **dict.fromkeys(("profiling", "tensorrt"), _PLAIN | {"compile"}),
    "distributed": _PLAIN | {"profiling"},
    "proposal": _PLAIN | {"algorithm", "distributed"},
    "rewards": _PLAIN | {"distributed", "shapes"},
    "memory": _PIECES | {"rewards"},
    "prompt_tables": set(),
    "prompt_files": {"prompt_tables"},
    "prompts": _PLAIN | {"prompt_files"},
    "ema": _PLAIN,
    "old_policy": _PLAIN | {"ema"},
    "sampler": _CARRIED,
    "replay": _PIECES,
    **dict.fromkeys(("step_replay", "image_replay"), _CARRIED | {"replay", "old_policy"}),
    "signals": _CARRIED | {"sampler", "rollout", "replay", "step_replay", "image_replay", "old_policy"},
    **dict.fromkeys(("step_noise", "rollout", "search_portion"), _CARRIED | {"sampler"}),
    "start_noise": _CARRIED | {"sampler", "proposal"},
    "image_search": _CARRIED | {"sampler", "search_portion"},
    **dict.fromkeys(("prompt_images", "evaluation"), _CARRIED | {"sampler", "search_portion", "image_search"}),
    "retry": _CARRIED | {"start_noise", "rollout"},
    "update": _CARRIED | {"replay"},
    "health": _CARRIED | {"update"},
    **dict.fromkeys(("checkpoints", "records"), _LINE),
    "trainer": _LINE | {"checkpoints", "records"},
    "overrides": set(),
    "pieces": {"own_code"},
    "leaves": set(),
    "composing": set(),
    "mistakes": {"composing"},
    "meanings": {"composing", "leaves"},
    "config": {"files", "overrides", "own_code", "pieces", "composing", "mistakes", "meanings"},
    "help": {"composing", "config", "meanings", "leaves"},
    "given": {"files", "prompts", "prompt_files", "rewards", "types"},
    "known_warnings": set(),
    "parts": _CARRIED | {"prompts", "pieces", "given"},
    # reads what runs have written, and the default config
    "report": {"files", "records", "composing", "leaves"},
    "assembly": _RUN | {"parts", "report"},
    "training": _RUN | {"parts", "given", "assembly"},
    "commands": _RUN | _FACE | {"assembly", "training", "shapes", "report"},
    "cli": _RUN | _FACE | {"training", "commands", "help"},
    "library": _RUN | _FACE | {"training", "commands"},
    "__main__": {"cli"},
}
CONFINED = {
    # submitit is started by Hydra's launcher
    "hydra": (
        "fastgrpo/composing.py",
        "fastgrpo/config.py",
        "fastgrpo/overrides.py",
        "fastgrpo/pieces.py",
        "fastgrpo/commands/submit.py",
    ),
    "hydra_plugins": ("fastgrpo/commands/submit.py",),
    "submitit": ("fastgrpo/commands/submit.py",),
    "omegaconf": (
        "fastgrpo/cli.py",
        "fastgrpo/composing.py",
        "fastgrpo/config.py",
        "fastgrpo/mistakes.py",
        "fastgrpo/help.py",
        "fastgrpo/meanings.py",
        "fastgrpo/pieces.py",
        "fastgrpo/parts.py",
        # the config of a run, as a file
        "fastgrpo/checkpoints/same_run.py",
        "fastgrpo/report/",
        # for the type of what they are given
        "fastgrpo/assembly.py",
        "fastgrpo/training.py",
        "fastgrpo/commands/",
        "fastgrpo/library/",
    ),
    "bokeh": ("fastgrpo/report/",),
    "jinja2": ("fastgrpo/report/",),
    "diffusers": ("fastgrpo/models/", "fastgrpo/shapes/pretrain/"),
    "transformers": ("fastgrpo/models/", "fastgrpo/rewards/", "fastgrpo/shapes/pretrain/"),
    "peft": ("fastgrpo/models/",),
    "flash_attn": ("fastgrpo/models/attention.py",),
    "flash_attn_interface": ("fastgrpo/models/attention.py",),
    "xformers": ("fastgrpo/models/attention.py",),
    "torch_tensorrt": ("fastgrpo/tensorrt/backend",),
    "tensorrt": ("fastgrpo/tensorrt/backend",),
    "tensorrt_rtx": ("fastgrpo/tensorrt/backend",),
    "onnx": ("fastgrpo/tensorrt/backend",),
    "ImageReward": ("fastgrpo/rewards/image_reward.py",),
    # where a notebook has it
    "IPython": ("fastgrpo/records/live.py",),
    "rapidocr": ("fastgrpo/rewards/ocr.py",),
    "rapidfuzz": ("fastgrpo/rewards/ocr.py",),
    "requests": ("fastgrpo/rewards/remote/",),
    "fastapi": ("fastgrpo/rewards/remote/",),
    "uvicorn": ("fastgrpo/commands/serve_reward.py",),
    "huggingface_hub": (
        "fastgrpo/files/hub.py",
        "fastgrpo/rewards/networks/checkpoints.py",
        "fastgrpo/models/quiet.py",
    ),
    "triton": ("kernels/",),
    "fastgrpo_kernels": (
        "kernels/",
        "fastgrpo/algorithm/",
        "fastgrpo/models/",
        "fastgrpo/rewards/",
        "fastgrpo/sampler.py",
        "fastgrpo/rollout.py",
        "fastgrpo/image_replay.py",
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


def test_a_file_imports_only_what_its_floor_may() -> None:
    wrong = [f"{path}: {line}" for path in FILES for line in _wrong_imports(path)]
    assert not wrong, "\n".join(wrong)


def _wrong_imports(path: Path) -> Iterator[str]:
    name = path.parts[1].removesuffix(".py")
    for module in imported_modules((ROOT / path).read_text()):
        top, *rest = module.split(".")
        allowed = CONFINED.get(top)
        if allowed is not None and not str(path).startswith(allowed):
            yield f"imports {module}: only {allowed} may"
        if path.parts[0] == "kernels":
            if top not in KERNELS_MAY_IMPORT:
                yield f"imports {module}: kernels need torch and triton only"
        elif top == "fastgrpo" and name != "__init__":
            if not rest:
                yield "import what you need from fastgrpo, by name"
            elif rest[0] not in MAY_IMPORT[name] | {name}:
                yield f"imports {module}: {name} may not import {rest[0]}"
            elif name in _SEE_AN_ADAPTER and rest[:2] != ["models", "adapter"] and rest[0] == "models":
                yield f"imports {module}: {name} sees a model only as the adapter"


def test_every_module_of_the_package_has_a_floor() -> None:
    modules = {path.parts[1].removesuffix(".py") for path in FILES if path.parts[0] == "fastgrpo"} - {"__init__"}
    assert modules == MAY_IMPORT.keys()


def test_no_floor_leads_back_to_itself() -> None:
    """Each room is read without those above it: what it may import, and what that may, never comes back."""
    for room in MAY_IMPORT.keys() - {"cli", "commands", "__main__"}:
        seen, ahead = set(), set(MAY_IMPORT[room])
        while ahead:
            seen |= ahead
            ahead = {below for other in ahead for below in MAY_IMPORT[other]} - seen
        assert room not in seen, f"{room} comes back to itself"


def test_no_pickle_crosses_a_network() -> None:
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        collectives_of_objects = {name for name in names if name.endswith(("_object", "_object_list"))}
        assert not collectives_of_objects, f"{path} uses {collectives_of_objects}, which unpickle what others send"
