"""DiffusionNFT's own training, unmodified, from a user's checkout of github.com/NVlabs/DiffusionNFT.

Its loss is inside ``main()`` of scripts/train_nft_sd3.py.  Two statements of it are cut out of the source and executed
as they are: the loop over inner epochs (shuffling, noising, loss, optimizer, average), and the one that moves the
weights which sample, ``old``, towards those that are trained.  Modules of its package are imported under another name,
since flow_grpo's package has the same.
"""

import ast
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from benchmarks.flow_grpo.checkout import definition, executed

_SCRIPT = "scripts/train_nft_sd3.py"
_PACKAGE = "flow_grpo"
_NEEDED = (
    _SCRIPT,
    f"{_PACKAGE}/diffusers_patch/pipeline_with_logprob.py",
    f"{_PACKAGE}/diffusers_patch/solver.py",
    f"{_PACKAGE}/stat_tracking.py",
    f"{_PACKAGE}/ema.py",
)
_URL = "https://github.com/NVlabs/DiffusionNFT"
_ALIAS = "diffusion_nft_checkout"


@dataclass(frozen=True)
class NFTCheckout:
    """A directory that holds DiffusionNFT; ValueError if it does not."""

    path: Path

    def __post_init__(self) -> None:
        if missing := ", ".join(name for name in _NEEDED if not (self.path / name).is_file()):
            raise ValueError(f"{self.path} is no checkout of DiffusionNFT: it lacks {missing}; clone {_URL}")

    def module(self, name: str) -> Any:
        """A module of its package, named without it; this process must import it from no other checkout."""
        package = sys.modules.get(_ALIAS)
        if package is None:
            package = sys.modules[_ALIAS] = ModuleType(_ALIAS)
            package.__path__ = [str(self.path / _PACKAGE)]
        module = importlib.import_module(f"{_ALIAS}.{name}")
        assert Path(str(module.__file__)).is_relative_to(self.path), f"{name} was imported from {module.__file__}"
        return module

    def return_decay(self) -> Any:
        """How much of the weights that sample stays, by the number of optimizer steps."""
        return executed(self._script, "return_decay", {})

    def update(self) -> CodeType:
        """The loop over inner epochs."""
        return self._statement(
            "the loop over inner epochs",
            lambda node: isinstance(node, ast.For) and _names(node.target) == {"inner_epoch"},
        )

    def move_old(self) -> CodeType:
        """What follows it: ``old`` becomes a mean of itself and what was trained."""
        return self._statement(
            "the update of the weights that sample",
            lambda node: isinstance(node, ast.With) and "return_decay" in _names(node),
        )

    @property
    def _script(self) -> Path:
        return self.path / _SCRIPT

    def _statement(self, what: str, is_wanted: Any) -> CodeType:
        statements = (node for node in ast.walk(definition(self._script, "main")) if isinstance(node, ast.stmt))
        found = [node for node in statements if is_wanted(node)]
        if len(found) != 1:
            raise ValueError(f"{self._script} has {what} {len(found)} times, not once; clone {_URL}")
        return compile(ast.Module(body=[found[0]], type_ignores=[]), str(self._script), "exec")


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
