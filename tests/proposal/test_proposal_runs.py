"""Learned start noise in runs: where it begins, on several ranks, after a kill, and in the commands that use a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from benchmarks.rounding import Run, beyond_rounding, differences
from fastgrpo import cli
from fastgrpo.assembly import build_trainer
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.checkpoints.train_state import TrainState
from fastgrpo.distributed.world import World
from fastgrpo.proposal.files import load_proposal, save_proposal
from fastgrpo.proposal.network import ProposalNetwork, ProposalShape
from fastgrpo.training import train
from fastgrpo.types import Samples
from tests import tiny_config
from tests.checkpoints.test_resume import lasting_metrics
from tests.distributed import training
from tests.ranks import Ranks, ranks_of_module

LEARNED = ("algorithm/noise=learned", "algorithm.noise.learning_rate=0.1")
IMAGES = ("algorithm=nft", "algorithm.schedule.num_steps=3", "train.updates=2")
STEPS = ("algorithm.objective.kl_coef=0", "train.gradients=reweight", "train.optimizer_steps=2")
KEPT = ("train.iterations=4", "checkpoint.every=2", "checkpoint.asynchronous=false", "evaluate.every=4")

on_ranks = ranks_of_module()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than training."""
    monkeypatch.setattr("fastgrpo.records.metrics.draw_curves", lambda rows, path, title: None)


@pytest.mark.parametrize("signal", [IMAGES, STEPS])
def test_the_first_iteration_is_that_of_plain_noise_to_the_bit(
    signal: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    first, second, starts = {}, {}, {}
    for noise in ("learned", "gaussian"):
        words = [*signal, f"algorithm/noise={noise}", "reward.golden=false"]
        words += LEARNED[1:] if noise == "learned" else ()
        trainer = build_trainer(tiny_config.make_config(tiny_weights, tmp_path / noise, *words))
        first[noise] = trainer.step()
        samples = Samples.all_of(trainer.prompts.at(1), trainer.group_size)
        starts[noise] = trainer.start_noise(samples, 1).start_BCHW
        second[noise] = trainer.step()
    learned, plain = (
        {key: value for key, value in first[noise].items() if not key.startswith(("seconds", "images_per", "peak"))}
        for noise in ("learned", "gaussian")
    )
    assert learned.pop("proposal/kl") == 0.0
    assert learned.pop("proposal/grad_norm") > 0.0
    assert learned == plain
    assert (starts["learned"] - starts["gaussian"]).abs().max() > 0.1
    assert second["learned"]["proposal/kl"] > 0.5
    assert second["learned"]["reward/total"] != second["gaussian"]["reward/total"]


def test_a_proposal_is_handed_what_the_policy_learns_from(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*IMAGES, *LEARNED, "reward.golden=false")
    trainer = build_trainer(tiny_config.make_config(tiny_weights, tmp_path / "run", *words))
    learn, update, handed, learned = trainer.proposal.learn, type(trainer.update).__call__, [], []

    def learn_spy(*arguments: Any) -> dict[str, float]:
        handed.append(arguments)
        return learn(*arguments)

    def update_spy(self: Any, trained: Any, conditions: Any, advantages_B: Tensor, *others: Any, **named: Any) -> Any:
        learned.append((conditions, advantages_B))
        return update(self, trained, conditions, advantages_B, *others, **named)

    monkeypatch.setattr(trainer.proposal, "learn", learn_spy)
    monkeypatch.setattr(type(trainer.update), "__call__", update_spy)
    expected_BCHW = trainer.start_noise(Samples.all_of(trainer.prompts.at(0), trainer.group_size), 0).start_BCHW
    metrics = trainer.step()
    ((samples, conditions_B, noise, advantages_B, rewards_PG),) = handed
    assert conditions_B is learned[0][0]
    assert advantages_B is learned[0][1]
    assert samples.texts == [text for text in trainer.prompts.at(0).texts for _ in range(trainer.group_size)]
    assert torch.equal(noise.start_BCHW, expected_BCHW)
    assert rewards_PG.mean().item() == pytest.approx(metrics["reward/total"])


def learned_run(world: World, config: DictConfig, output: Path) -> tuple[Run, dict[str, Tensor]]:
    """A run, and what its proposal is in the end."""
    trainer = training.make_trainer(world, config, output)
    began = training.trained(trainer)
    trainer.resume()
    trainer.run()
    assert isinstance(trainer.record, training.Kept)
    run = Run(rows=trainer.record.rows, began=began, ended=training.trained(trainer))
    return run, {name: tensor.clone() for name, tensor in trainer.proposal.tensors.items()}


@pytest.mark.parametrize(("signal", "num_ranks", "mix"), [(IMAGES, 2, 0.0), (STEPS, 4, 0.6)])
def test_ranks_learn_what_one_process_does(
    signal: tuple[str, ...], num_ranks: int, mix: float, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    # with few prompts learned, some rank has no sample of them
    words = (*training.FLOAT64, *signal, *LEARNED, f"algorithm.noise.mix={mix}", "train.iterations=3")
    config = training.make_config(tiny_weights, *words)
    alone, proposal = learned_run(World(), config, tmp_path / "1")
    found = on_ranks(num_ranks, learned_run, config, tmp_path / "ranks")
    assert beyond_rounding(differences(alone, found[0][0]), "float64") == {}
    # of iterations whose prompts are all plain there is none
    assert [row["proposal/kl"] for row in alone.rows if row.get("proposal/kl", 0.0) > 0.0]
    for _, others in found:
        for name, tensor in proposal.items():
            assert torch.equal(others[name], found[0][1][name])
            torch.testing.assert_close(others[name], tensor, rtol=1e-7, atol=1e-12)


@pytest.fixture(scope="module")
def undisturbed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config.make_config(tiny_weights, tmp_path_factory.mktemp("whole") / "run", *LEARNED, *KEPT))


def tensors_of(run: Path) -> dict[str, bytes]:
    last = run / "checkpoints" / "step_000004"
    names = ("weights", "ema", "optimizer", "proposal")
    return {name: (last / f"{name}.safetensors").read_bytes() for name in names}


def test_a_resumed_run_ends_as_an_undisturbed_one(undisturbed: Path, tiny_weights: Path, tmp_path: Path) -> None:
    train(tiny_config.make_config(tiny_weights, tmp_path / "run", *LEARNED, *KEPT, "train.iterations=2"))
    words = (*LEARNED, *KEPT, "resume=true")
    train(tiny_config.make_config(tiny_weights, tmp_path / "run", *words))
    assert lasting_metrics(tmp_path / "run")[3:] == lasting_metrics(undisturbed)[3:]
    assert tensors_of(tmp_path / "run") == tensors_of(undisturbed)


def test_what_a_run_learned_is_in_its_directory_and_its_checkpoint(undisturbed: Path) -> None:
    stored = safetensors.torch.load_file(undisturbed / "checkpoints/step_000004/proposal.safetensors")
    network = load_proposal(undisturbed / "proposal")
    assert network.shape == ProposalShape(channels=16, text_width=32, width=64, cells=8, learns_std=False, max_kl=10.0)
    for name, weight in network.state_dict().items():
        assert weight.abs().max() > 0
        assert torch.equal(weight, stored[f"proposal/weights/{name}"])


def test_a_checkpoint_from_before_proposals_is_read(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2)}
    state = TrainState(
        iteration=1, seconds=0.0, weights=weights, ema=weights, old={}, optimizer={}, model="m", extra={}
    )
    checkpoint = Checkpoint(tmp_path, every=1, keep=1)
    path = checkpoint.save(state)
    assert not (path / "proposal.safetensors").exists()
    assert checkpoint.load_matching(path, state).proposal == {}
    assert checkpoint.load_proposal(path) == ({}, {})


# the commands


@pytest.fixture
def sampled(undisturbed: Path, tmp_path: Path) -> Callable[..., list[np.ndarray]]:
    """The images of ``fastgrpo sample`` of the run, from words of its own."""

    def sample(name: str, *words: str) -> list[np.ndarray]:
        given = ["sample", "prompt=a red circle", "num_steps=2", "images_per_prompt=2", "runtime.micro_batch=4"]
        run = [] if any(word.startswith("run=") for word in words) else [f"run={undisturbed}"]
        assert cli.main([*given, *run, *words, f"output={tmp_path / name}"]) == 0
        return [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("0*.png"))]

    return sample


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def test_sampling_starts_from_what_the_run_learned_unless_told_otherwise(
    undisturbed: Path, tmp_path: Path, sampled: Callable[..., list[np.ndarray]], capsys: pytest.CaptureFixture[str]
) -> None:
    default = sampled("default")
    assert f"with learned start noise, proposal=auto of run={undisturbed}" in capsys.readouterr().out
    assert not same(default, sampled("plain", "proposal=none"))
    assert "learned" not in capsys.readouterr().out
    step = undisturbed / "checkpoints" / "step_000002"
    assert same(default, sampled("run", "proposal=run"))
    assert not same(sampled("step", f"run={step}"), sampled("other", f"run={step}", f"proposal={undisturbed}/proposal"))
    assert cli.main(["export", f"run={undisturbed}", f"output={tmp_path / 'exported'}"]) == 0
    assert f"fastgrpo sample proposal={tmp_path / 'exported' / 'proposal'}" in capsys.readouterr().out
    assert same(default, sampled("exported_images", f"proposal={tmp_path / 'exported' / 'proposal'}"))
    # a search finds its own
    with_search = sampled("searched", "search=true", "reward=jpeg_incompressibility", "algorithm.noise.candidates=2",
                          "algorithm.noise.elites=2", "algorithm.noise.estimate_steps=1")  # fmt: skip
    assert not same(default, with_search)


def test_evaluation_is_from_plain_noise_unless_told_otherwise(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()][-1]
    words = ["evaluate", "reward=jpeg_incompressibility", f"prompts.held_out={undisturbed.parent / 'prompts.txt'}"]
    words += ["evaluate.images_per_prompt=1", "evaluate.num_steps=2", "runtime.micro_batch=4", f"run={undisturbed}"]
    reports: dict[str, Any] = {}
    for proposal in ("default", "run", str(undisturbed / "proposal")):
        output = tmp_path / f"evaluation_{len(reports)}"
        given = [] if proposal == "default" else [f"proposal={proposal}"]
        assert cli.main([*words, *given, f"output={output}"]) == 0
        reports[proposal] = json.loads((output / "evaluation.json").read_text())
    plain, of_run, of_directory = reports.values()
    assert plain["rewards"]["jpeg"]["mean"] == pytest.approx(logged["eval/jpeg"], rel=1e-6)
    assert plain["start_noise"] == "plain"
    assert of_run["rewards"] == of_directory["rewards"] != plain["rewards"]
    assert of_run["start_noise"] == f"with learned start noise, proposal=run of run={undisturbed}"


def test_a_proposal_that_is_not_there_or_does_not_fit_is_refused_in_a_line(
    undisturbed: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_config.make_config(tiny_weights, tmp_path / "plain", "train.iterations=1", "evaluate.every=9")
    train(plain)
    other = ProposalShape(channels=4, text_width=32, width=2, cells=2, learns_std=False, max_kl=1.0)
    save_proposal(ProposalNetwork(other), tmp_path / "other")
    cases = [
        ([f"run={tmp_path / 'plain'}", "proposal=run"], f"run={tmp_path / 'plain'} has learned no proposal"),
        (
            ["proposal=run", f"model.weights={tiny_weights}"],
            "proposal=run takes the proposal of a run, and run is empty",
        ),
        (
            [f"run={undisturbed}", f"proposal={tmp_path / 'other'}"],
            "is a proposal for 4 latent channels, and this model",
        ),
        ([f"run={undisturbed}", f"proposal={tmp_path}"], "holds no learned proposal"),
        ([f"run={undisturbed}", "proposal=run", "search=true"], "a search begins with plain noise, got proposal=run"),
    ]
    for number, (words, says) in enumerate(cases):
        capsys.readouterr()
        assert cli.main(["sample", "prompt=a", *words, f"output={tmp_path / str(number)}"]) == cli.BAD_INPUT
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert says in line
        # what is not there is known before anything is written
        if says != "is a proposal for 4 latent channels, and this model":
            assert not (tmp_path / str(number)).exists()
    # where nothing is asked for, a run without one is sampled from plain noise
    assert cli.main(["sample", "prompt=a", f"run={tmp_path / 'plain'}", "num_steps=1", f"output={tmp_path / 'p'}"]) == 0


def test_a_model_without_pooled_texts_learns_in_two_resolutions(tmp_path: Path) -> None:
    rows = [{"prompt": "a red circle"}, {"prompt": "two blue squares", "resolution": [64, 32]}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    words = ["model=z_image_miniature", "model.resolution=64", *IMAGES, *LEARNED, "model.guidance_scale=1"]
    words += [f"prompts.path={prompts}", "reward.golden=false", "train.prompts_per_iteration=1"]
    config = tiny_config.make_config(Path("random"), tmp_path / "run", *words)
    trainer = build_trainer(config)
    assert trainer.model.encode(["a"]).pooled_BC.shape[1] == 0
    metrics = [trainer.step() for _ in range(4)]
    assert len({(row["height"], row["width"]) for row in metrics if "height" in row} | {None}) == 2
    assert metrics[0]["proposal/kl"] == 0.0
    assert all(0.0 < row["proposal/kl"] < 10.0 for row in metrics[1:])
