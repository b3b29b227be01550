"""The cases of benchmarks.gpu_paths name configs that exist, cover what there is to choose, and are told apart."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_paths import __main__ as command
from benchmarks.gpu_paths.cases import MINIATURES, RECIPES, Case, all_cases
from fastgrpo.composing import config_groups
from fastgrpo.config import load_config
from fastgrpo.models.attention import BACKENDS
from tests.processes import lives, wait_until

CASES = all_cases()


def overrides_of(case: Case) -> str:
    return " ".join(word for run in case.runs for word in run)


# a config takes a good part of a second
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_case_is_a_config_that_is_accepted(name: str) -> None:
    for run in CASES[name].runs:
        # a run that goes on has the config of the first, which is not there yet
        load_config("train", [f"output=outputs/{name}", *(word for word in run if word != "resume=true")])


def test_every_recipe_model_kind_way_to_compile_solver_and_attention_is_tried() -> None:
    groups, tried = config_groups("train"), "\n".join(map(overrides_of, CASES.values()))
    assert set(RECIPES) == set(groups["algorithm"])
    for group in ("compile", "lossy", "reward_backend"):
        # auto and none are what the others run with
        assert all(f"{group}={option}" in tried for option in set(groups[group]) - {"auto", "none"}), group
    for recipe in RECIPES:
        assert {f"{recipe}-{how}" for how in ("eager", "blocks", "graphs")} <= CASES.keys()
    assert all(f"runtime.attention={name}" in tried for name in BACKENDS)
    assert set(MINIATURES) == {name for name in groups["model"] if name.endswith("_miniature")}
    assert all(f"model={model} " in tried for model in MINIATURES)
    # the first is the one that all others are
    assert all(f"solver={option}" in tried for option in set(groups["solver"]) - {"euler"})


def test_without_a_gpu_it_says_so_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["nft-eager"]) == command.NO_CUDA == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert command.main(["--list", "nft-eager", "nft-b*"]) == 0
    assert capsys.readouterr().out.split() == ["nft-eager", "nft-blocks", "nft-bfloat16"]
    with pytest.raises(SystemExit):
        command.main(["nothing-like-it"])
    assert "no case is called 'nothing-like-it'; --list names them" in capsys.readouterr().err


def test_what_passes_raises_and_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = {
        "a": "pass",
        "b": "import sys; sys.exit('fastgrpo: runtime.attention=auto takes sdpa\\nfastgrpo: no such thing; take x')",
        "c": "raise RuntimeError('expected all tensors to be on the same device')",
        "d": "pass",
    }
    cases = {name: Case(name=name, runs=((name,),), ranks=8 if name == "d" else 1) for name in program}
    monkeypatch.setattr(command, "all_cases", lambda: cases)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(command, "command_of", lambda case, run, output: [sys.executable, "-c", program[case.name]])
    assert command.main([]) == command.RAISED
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split(" s  ")[1] for line in lines] == [
        "pass",
        "raised fastgrpo: no such thing; take x",
        "raised RuntimeError: expected all tensors to be on the same device",
        "left out: needs 8 GPUs",
    ]
    assert total == "1 pass, 2 raised, 1 left out"


# ranks of torchrun are groups of their own, which it ends when it is asked to
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


@pytest.mark.parametrize(
    "launcher", [pytest.param([], id="alone"), pytest.param(_TORCHRUN, marks=pytest.mark.slow, id="torchrun")]
)
def test_what_does_not_end_is_ended_with_what_it_started(
    launcher: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told, script = tmp_path / "told.txt", tmp_path / "script.py"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n")
    monkeypatch.setattr(command, "command_of", lambda case, run, output: [sys.executable, *launcher, str(script)])
    monkeypatch.setattr(command, "_SECONDS", 20 if launcher else 2)
    assert "did not end in" in command.run(Case(name="x", runs=((),)), tmp_path)
    wait_until(lambda: not lives(int(told.read_text())))


def test_a_package_that_is_not_there_leaves_a_case_out() -> None:
    case = Case(name="x", runs=((),), package="no_such_package")
    assert find_spec("no_such_package") is None
    assert case.why_not(1) == "needs no_such_package"


def test_it_runs_what_a_user_would_write() -> None:
    alone, two = (Case(name="x", runs=((),), ranks=ranks) for ranks in (1, 2))
    words = ["-m", "fastgrpo", "train", "output=there/x", "runtime.device=cuda", "algorithm=nft"]
    assert command.command_of(alone, ["algorithm=nft"], Path("there/x")) == [sys.executable, *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert command.command_of(two, ["algorithm=nft"], Path("there/x")) == [sys.executable, *launcher, *words]
