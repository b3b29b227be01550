"""``import fastgrpo`` and ``python -m fastgrpo``."""

import subprocess
import sys
from importlib.metadata import version
from typing import assert_type

import pytest

import fastgrpo
from fastgrpo import cli


def test_importing_it_takes_no_torch_and_shows_what_there_is() -> None:
    program = (
        "import sys, fastgrpo\n"
        "assert {'train', 'sample', 'evaluate', 'load', 'Run', '__version__'} <= set(dir(fastgrpo))\n"
        "print(fastgrpo.__version__)\n"
        "assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)\n"
        "assert not hasattr(fastgrpo, 'nothing')\n"
        # no module of the package takes a function's name
        "import fastgrpo.cli, fastgrpo.training, fastgrpo.evaluation\n"
        "assert all(callable(getattr(fastgrpo, name)) for name in fastgrpo.__all__)\n"
        "from fastgrpo import Evaluated, RewardError, Run, Sampled, TrainingError, evaluate, load, sample, train\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == version("fastgrpo")


def test_every_name_has_a_docstring_and_its_own_module() -> None:
    assert set(fastgrpo.__all__) == set(fastgrpo._MODULES)
    for name in fastgrpo.__all__:
        value = getattr(fastgrpo, name)
        assert value.__doc__, name
        assert value.__module__ == fastgrpo._MODULES[name]
    # an example each
    for function in (fastgrpo.train, fastgrpo.sample, fastgrpo.evaluate, fastgrpo.load):
        assert f"fastgrpo.{function.__name__}(" in str(function.__doc__)


def types_as_a_user_sees_them(run: fastgrpo.Run) -> None:
    """Read by mypy alone."""
    assert_type(fastgrpo.train("name=x", reward=lambda images, prompts: 0), fastgrpo.Run)
    assert_type(fastgrpo.load("outputs/run"), fastgrpo.Run)
    assert_type(fastgrpo.sample(["a", {"prompt": "b"}], run=run), fastgrpo.Sampled)
    assert_type(fastgrpo.evaluate(run=run).means, dict[str, float])


def test_python_m_fastgrpo_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def ran(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-m", "fastgrpo", *words], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    for words in (["--help"], ["trian"]):
        code, shown = cli.main(words), capsys.readouterr()
        assert ran(*words) == (code, shown.out, shown.err)
