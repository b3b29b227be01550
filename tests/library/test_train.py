"""``fastgrpo.train`` does what the command does; a reward that is a function, prompts that are lists, and resuming."""

import json
import os
import signal
from pathlib import Path
from threading import Event, Thread

import pytest
from omegaconf import OmegaConf
from torch import Tensor

import fastgrpo
from fastgrpo import cli
from fastgrpo.given import Given
from fastgrpo.prompts import load_prompts
from fastgrpo.resolution import Resolution
from fastgrpo.types import Prompt
from tests.library.runs import brightness, lora, rows, words

NAMED = ("reward=custom", "reward.path=tests.library.runs.brightness")
TEXTS = ["a red circle", "two blue squares", "a green triangle"]


def test_it_is_the_command_to_the_bit(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fastgrpo.train(*words(tiny_weights, tmp_path / "function"))
    shown = capsys.readouterr().out
    assert cli.main(["train", *words(tiny_weights, tmp_path / "command")]) == 0
    assert run.path == tmp_path / "function"
    assert rows(run.path) == rows(tmp_path / "command")
    assert lora(run.path) == lora(tmp_path / "command")
    of_command = (tmp_path / "command/config.yaml").read_text()
    assert (run.path / "config.yaml").read_text() == of_command.replace(str(tmp_path / "command"), str(run.path))
    assert run.config == OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml"))
    names = {path.relative_to(run.path) for path in run.path.rglob("*") if "tensorboard" not in path.parts}
    others = (tmp_path / "command").rglob("*")
    assert names == {path.relative_to(tmp_path / "command") for path in others if "tensorboard" not in path.parts}
    assert "iteration 2/2" in shown


def test_a_run_says_what_its_directory_holds(tiny_weights: Path, tmp_path: Path) -> None:
    run = fastgrpo.train(*words(tiny_weights, tmp_path / "run", "evaluate.every=1"))
    assert fastgrpo.load(tmp_path / "run") == fastgrpo.load(run) == run
    assert os.fspath(run) == str(tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines]
    assert [row["iteration"] for row in run.evaluations] == [0, 1, 2]
    assert run.summary == json.loads((tmp_path / "run/summary.json").read_text())
    last = run.summary["last_evaluation"]
    assert run.last_evaluation == {"jpeg": last["eval/jpeg"]}
    assert all(path.exists() for path in (run.curves, run.before_after, run.lora))
    assert run._repr_png_() == (tmp_path / "run/curves.png").read_bytes()


def test_an_unfinished_run_has_no_summary_and_is_told_apart_from_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    run = fastgrpo.load(tmp_path)
    assert (run.metrics, run.evaluations, run.last_evaluation, run._repr_png_()) == ([], [], {}, None)
    with pytest.raises(ValueError, match=r"summary\.json is written when a run ends"):
        _ = run.summary
    with pytest.raises(ValueError, match="is no run directory, which has a config"):
        fastgrpo.load(tmp_path / "nowhere")


def test_a_function_and_its_path_are_one_reward(tiny_weights: Path, tmp_path: Path) -> None:
    """Where a module has the function, the command goes on with what Python began, and the other way round."""
    given = fastgrpo.train(*words(tiny_weights, tmp_path / "given", with_reward=False), reward=brightness)
    named = fastgrpo.train(*words(tiny_weights, tmp_path / "named", *NAMED, with_reward=False))
    assert given.config["reward"] == named.config["reward"]
    assert rows(given.path) == rows(named.path)
    words_on = ["resume=true", "train.iterations=3"]
    assert cli.main(["train", f"output={given.path}", *words_on, NAMED[1]]) == 0
    assert named.resume("train.iterations=3", reward=brightness) == named
    assert rows(given.path) == rows(named.path)
    assert len(rows(given.path)) == 4
    assert lora(given.path) == lora(named.path)


def test_a_lambda_trains_and_is_given_again_to_go_on(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = 1.0
    reward = lambda images, prompts: scale * brightness(images, prompts)  # noqa: E731
    # which resuming keeps
    weight = "reward.weights.custom=2.0"
    settings = words(tiny_weights, tmp_path / "run", weight, with_reward=False)
    run = fastgrpo.train(*settings, reward=reward)
    name = f"{__name__}.test_a_lambda_trains_and_is_given_again_to_go_on.<locals>.<lambda>"
    assert run.config["reward"]["path"] == name
    whole = fastgrpo.train(
        *words(tiny_weights, tmp_path / "whole", *NAMED, weight, "train.iterations=3", with_reward=False)
    )
    with pytest.raises(ValueError, match=r"reward\.path=.*<lambda> is a function of the program that gave it"):
        run.resume("train.iterations=3")
    for ask in (lambda: run.sample(["a"], "search=true"), run.evaluate):
        with pytest.raises(
            ValueError, match=r"reward\.path=.*<lambda> is a function of .*, evaluate, sample or run\.res"
        ):
            ask()
    assert cli.main(["train", f"output={run.path}", "resume=true", f"reward.path={name}"]) == 2
    assert "give it from Python, as reward=FUNCTION of fastgrpo.train" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"was begun otherwise: reward\.path was .*<lambda> and would be .*brightness"):
        run.resume("train.iterations=3", reward=brightness)
    assert len(run.metrics) == 3
    run.resume("train.iterations=3", reward=reward)
    assert rows(run.path) == rows(whole.path)


class Called:
    """A reward that is an object."""

    golden_set = "none"

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        assert set(prompts) <= {*TEXTS, "a red square"}
        return brightness(images_BCHW, prompts)


def test_a_list_is_read_as_the_file_that_is_kept_of_it(tmp_path: Path) -> None:
    # a tuple is a list in JSON
    given = Given(path=["a red circle", {"caption": "two squares", "tags": (1, 2), "resolution": 32}])
    given.keep(tmp_path)
    found = given.prompts("path", lambda prompt: prompt, "caption")
    assert found == load_prompts(tmp_path / "prompts.jsonl", column="caption")
    assert found == [
        Prompt("a red circle"),
        Prompt("two squares", resolution=Resolution(32, 32), metadata={"tags": [1, 2]}),
    ]


def test_lists_are_the_files_that_they_would_be(tiny_weights: Path, tmp_path: Path) -> None:
    settings = words(tiny_weights, tmp_path / "run", with_reward=False, with_prompts=False)
    held_out = [{"prompt": "a red square"}]
    run = fastgrpo.train(*settings, reward=Called(), prompts=TEXTS, held_out=held_out)
    (tmp_path / "train.txt").write_text("\n".join(TEXTS))
    (tmp_path / "test.txt").write_text("a red square\n")
    files = (f"prompts.path={tmp_path / 'train.txt'}", f"prompts.held_out={tmp_path / 'test.txt'}")
    of_files = fastgrpo.train(*words(tiny_weights, tmp_path / "files", *files, *NAMED, with_reward=False))
    assert rows(run.path) == rows(of_files.path)
    assert run.config["reward"]["path"] == f"{__name__}.Called"
    assert json.loads((run.path / "held_out_prompts.jsonl").read_text()) == held_out[0]
    # given again or not, they are the same; others are not
    with pytest.raises(ValueError, match=r"began with other prompts than are given, see .*/prompts\.jsonl"):
        fastgrpo.train(f"output={run.path}", "resume=true", reward=Called(), prompts=TEXTS[:2])
    run.resume("train.iterations=3", reward=Called())
    again = ("resume=true", "train.iterations=4")
    fastgrpo.train(f"output={run.path}", *again, reward=Called(), prompts=TEXTS, held_out=held_out)
    assert [row["iteration"] for row in run.metrics] == [0, 1, 2, 3, 4]


def test_in_a_thread_it_trains_the_same(tiny_weights: Path, tmp_path: Path) -> None:
    runs: list[fastgrpo.Run] = []
    threads = [
        Thread(target=lambda name=name: runs.append(fastgrpo.train(*words(tiny_weights, tmp_path / name))))
        for name in ("first", "second")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    here = fastgrpo.train(*words(tiny_weights, tmp_path / "here"))
    assert len(runs) == 2
    assert all(lora(run.path) == lora(here.path) and rows(run.path) == rows(here.path) for run in runs)


def test_an_interrupt_ends_the_iteration_and_the_run_goes_on_as_if_there_had_been_none(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def pressing(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(prompts))
        # the first evaluation is one, each iteration one
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(images_BCHW, prompts)

    settings = ("reward.golden=false", "train.iterations=3")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after iteration 1, which is saved"):
        fastgrpo.train(*words(tiny_weights, tmp_path / "run", *settings, with_reward=False), reward=pressing)
    assert signal.getsignal(signal.SIGINT) is before
    said = f"go on with: fastgrpo.train('output={tmp_path / 'run'}', 'resume=true', reward=...)\n"
    assert said in capsys.readouterr().out
    run = fastgrpo.load(tmp_path / "run")
    assert run.summary["iterations"] == 1
    run.resume(reward=pressing)
    whole = fastgrpo.train(*words(tiny_weights, tmp_path / "whole", *settings, *NAMED, with_reward=False))
    assert rows(run.path) == rows(whole.path)
    assert lora(run.path) == lora(whole.path)


def test_another_thread_stops_a_run_which_is_returned_and_goes_on(tiny_weights: Path, tmp_path: Path) -> None:
    stop, runs = Event(), []

    def stopping(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        # in the second iteration: the first evaluation is six images, as each iteration is
        seen.append(len(prompts))
        if len(seen) == 3:
            stop.set()
        return brightness(images_BCHW, prompts)

    seen: list[int] = []
    settings = ("reward.golden=false", "train.iterations=3", "evaluate.every=9", "checkpoint.every=9")
    stopped = words(tiny_weights, tmp_path / "run", *settings, with_reward=False)
    thread = Thread(target=lambda: runs.append(fastgrpo.train(*stopped, reward=stopping, stop=stop)))
    thread.start()
    thread.join()
    (run,) = runs
    assert run.summary["iterations"] == 2
    # it is set still
    assert run.resume(reward=stopping, stop=stop).summary["iterations"] == 3
    whole = fastgrpo.train(*words(tiny_weights, tmp_path / "whole", *settings, *NAMED, with_reward=False))
    assert rows(run.path) == rows(whole.path)
    assert lora(run.path) == lora(whole.path)


@pytest.mark.parametrize(
    ("settings", "given", "says"),
    [
        (["sed=1"], {}, "unknown key sed; did you mean seed"),
        (["train"], {}, "'train' is not a setting; write train=VALUE"),
        ([{"seed": 1}], {}, "is not a setting; write each as a text"),
        (["reward=shapes"], {"reward": brightness}, "reward=shapes: the reward is given as a function too"),
        (["reward.path=a.b"], {"reward": brightness}, "the reward is given as a function too"),
        ([], {"reward": "shapes"}, "reward is 'shapes' and cannot be called; .*'reward=shapes'"),
        ([], {"reward": lambda images: 0}, r"reward=.*<lambda> takes \(images\), but a reward is called as"),
        (["prompts.path=x"], {"prompts": ["a"]}, r"prompts\.path=x: these prompts are given as a list too"),
        (["prompts.held_out=x"], {"held_out": ["a"]}, r"prompts\.held_out=x: these prompts are given as a list too"),
        ([], {"prompts": "a red circle"}, r"prompts are a list of texts, .* write \['a red circle'\]"),
        ([], {"prompts": ["a", 3]}, r"prompts\.path: row 2 of the list is 3; give a text"),
        ([], {"held_out": ["a", " "]}, r"prompts\.held_out: row 2: blank prompt"),
        ([], {"prompts": []}, r"prompts\.path: the list that was given is empty; give at least one prompt"),
        ([], {"prompts": [{"prompt": {1, 2}}]}, "cannot be written as JSON"),
    ],
)
def test_a_mistake_is_a_value_error_and_nothing_is_written(
    settings: list[str], given: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        fastgrpo.train(f"output={tmp_path / 'run'}", *settings, **given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
