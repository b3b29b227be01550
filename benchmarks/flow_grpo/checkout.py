"""Flow-GRPO's own functions, unmodified, from a user's checkout of github.com/yifan123/flow_grpo.

Modules of its package are imported.  ``compute_log_prob`` is in a training script, whose imports (absl, ml_collections,
wandb) and command-line flags are not wanted here: that one definition is cut out of the source and executed as it is.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from benchmarks.flow_grpo.recipe import Recipe

_PATCH = "flow_grpo/diffusers_patch"
_NEEDED = (
    f"{_PATCH}/sd3_pipeline_with_logprob.py",
    f"{_PATCH}/sd3_sde_with_logprob.py",
    f"{_PATCH}/train_dreambooth_lora_sd3.py",
    "flow_grpo/stat_tracking.py",
    "flow_grpo/ema.py",
    "flow_grpo/rewards.py",
    "scripts/train_sd3.py",
)
_NEEDED_BY_FAST = (f"{_PATCH}/sd3_pipeline_with_logprob_fast.py", "scripts/train_sd3_fast.py")
_URL = "https://github.com/yifan123/flow_grpo"


@dataclass(frozen=True)
class Checkout:
    """A directory that holds flow_grpo; ValueError if it does not."""

    path: Path

    def __post_init__(self) -> None:
        if missing := self._missing(_NEEDED):
            raise ValueError(f"{self.path} is no checkout of flow_grpo: it lacks {missing}; clone {_URL}")

    def runs(self, recipe: Recipe) -> bool:
        return not recipe.window or not self._missing(_NEEDED_BY_FAST)

    def script(self, recipe: Recipe) -> Path:
        return self.path / "scripts" / ("train_sd3_fast.py" if recipe.window else "train_sd3.py")

    def detaches_unconditional(self, recipe: Recipe) -> bool:
        """Whether its gradient leaves out the unconditional branch, as versions before August 2025 do."""
        names = {"noise_pred_uncond"}
        return any(
            isinstance(node, ast.Attribute)
            and node.attr == "detach"
            and isinstance(node.value, ast.Name)
            and node.value.id in names
            for node in ast.walk(definition(self.script(recipe), "compute_log_prob"))
        )

    def module(self, name: str) -> Any:
        """A module of its package; this process must import it from no other checkout."""
        if str(self.path) not in sys.path:
            sys.path.insert(0, str(self.path))
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).is_relative_to(self.path), f"{name} was imported from {module.__file__}"
        return module

    def compute_log_prob(self, recipe: Recipe) -> Callable[..., Any]:
        """The function that replays a step, of the script that trains ``recipe``."""
        step = self.module("flow_grpo.diffusers_patch.sd3_sde_with_logprob").sde_step_with_logprob
        function: Callable[..., Any] = executed(
            self.script(recipe), "compute_log_prob", {"torch": importlib.import_module("torch"), step.__name__: step}
        )
        return function

    def commit(self) -> str:
        """Its commit, or "unknown" where the directory is no git checkout or the machine has no git."""
        command = ["git", "-C", str(self.path), "rev-parse", "--show-toplevel", "HEAD"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return "unknown"
        top, _, commit = result.stdout.strip().partition("\n")
        return commit if result.returncode == 0 and Path(top) == self.path.resolve() else "unknown"

    def _missing(self, needed: Sequence[str]) -> str:
        return ", ".join(name for name in needed if not (self.path / name).is_file())


def choose(checkouts: Sequence[Checkout], recipe: Recipe) -> Checkout | None:
    """The first that can run ``recipe``; with guidance, one whose gradient is ours comes before one whose is not."""
    able = [checkout for checkout in checkouts if checkout.runs(recipe)]
    if recipe.guidance_scale > 1:
        able.sort(key=lambda checkout: not checkout.detaches_unconditional(recipe))
    return able[0] if able else None


def definition(path: Path, name: str) -> ast.FunctionDef:
    """A top-level function of a source file; ValueError if it has none of that name."""
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"{path} has no function {name}; use a checkout of {_URL} from between May and December 2025")


def executed(path: Path, name: str, names: Mapping[str, Any]) -> Any:
    """That function alone, as its file defines it; ``names`` are what its body finds outside of it."""
    module = ast.Module(body=[definition(path, name)], type_ignores=[])
    code: CodeType = compile(module, str(path), "exec")
    found = dict(names)
    exec(code, found)
    return found[name]
