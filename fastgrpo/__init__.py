"""Online reinforcement learning of flow-matching image models, as a library.

    import fastgrpo

    run = fastgrpo.train("algorithm=nft", "train.max_minutes=10", "name=first")
    print(run.last_evaluation, run.curves)
    images = fastgrpo.sample("a red circle left of a blue square", run=run)

The functions do what the commands of the same names do, and their settings are the commands' own, ``"key=value"`` each:
``fastgrpo train --help`` lists them.  What is wrong with one is a ValueError.  Importing this package takes no time:
torch is imported with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

if TYPE_CHECKING:
    from fastgrpo.health import TrainingError
    from fastgrpo.library.evaluate import Evaluated, evaluate
    from fastgrpo.library.run import Run, load, train
    from fastgrpo.library.sample import Sampled, sample
    from fastgrpo.rewards.reward import RewardError

    __version__: str

_MODULES = {
    "Evaluated": "fastgrpo.library.evaluate",
    "RewardError": "fastgrpo.rewards.reward",
    "Run": "fastgrpo.library.run",
    "Sampled": "fastgrpo.library.sample",
    "TrainingError": "fastgrpo.health",
    "evaluate": "fastgrpo.library.evaluate",
    "load": "fastgrpo.library.run",
    "sample": "fastgrpo.library.sample",
    "train": "fastgrpo.library.run",
}
__all__ = ["Evaluated", "RewardError", "Run", "Sampled", "TrainingError", "evaluate", "load", "sample", "train"]


if not TYPE_CHECKING:
    # hidden from type checkers, which would believe in any name
    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("fastgrpo")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with catch_warnings():
            # said by tqdm in a notebook that has no ipywidgets, which a run's progress does without
            filterwarnings("ignore", message="IProgress not found")
            value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
