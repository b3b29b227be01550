"""A row's negative prompt is the text of the other branch of guidance: diffusers' images, and everywhere in a run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from fastgrpo import cli
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.assembly import _planner, build_trainer, load_rewards
from fastgrpo.commands.doctor import replayed
from fastgrpo.config import load_config
from fastgrpo.distributed.spread import Spread
from fastgrpo.image_search import plain
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adapter import encoded
from fastgrpo.models.lora import LoRA
from fastgrpo.models.policy import Policy
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.parts import RunParts
from fastgrpo.prompt_images import PromptImages, search_images
from fastgrpo.retry import Made
from fastgrpo.rewards.jpeg import JpegSize
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.training import _encode_ahead
from fastgrpo.types import Conditions, Prompt, Prompts, Samples, as_prompts
from fastgrpo_kernels import combined
from tests.field import Field
from tests.qwen_families import QWEN_IMAGE
from tests.tiny_config import make_overrides

TEXTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]
NEGATIVES = ["a blue square", None, "two circles", None]
ROWS = [Prompt(text, negative=negative) for text, negative in zip(TEXTS, NEGATIVES, strict=True)]
SCALE = 4.5


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> StableDiffusion3:
    adaptation = LoRA(rank=4)
    found = StableDiffusion3(
        weights=str(tiny_weights),
        adaptation=adaptation,
        resolution=64,
        use_t5=False,
        max_sequence_length=0,
        guidance_scale=SCALE,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in found.trainable.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return found


def start(num: int) -> Tensor:
    return torch.randn(num, 16, 8, 8, generator=torch.Generator().manual_seed(3))


def test_images_are_those_of_diffusers_with_negative_prompts(tiny_weights: Path) -> None:
    settings: dict[str, Any] = {"guidance_scale": SCALE, "max_sequence_length": 0}
    model = StableDiffusion3(
        weights=str(tiny_weights), adaptation=LoRA(rank=4), resolution=64, use_t5=False, **settings
    )
    sampler = Sampler(model=model, grid=SD3Schedule(6)(), batch_sizes=BatchSizes.of(4))
    make = PromptImages(sampler=sampler, make=plain(sampler, lambda *_: start(4)), images_per_prompt=1, seed=0)
    ((_, ours),) = make(ROWS)
    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_weights, **without)
    pipeline.set_progress_bar_config(disable=True)
    negatives = [negative or "" for negative in NEGATIVES]
    theirs = pipeline(
        TEXTS, negative_prompt=negatives, latents=start(4), num_inference_steps=6, output_type="pt", **settings
    ).images
    torch.testing.assert_close(ours.images_BCHW, theirs, atol=1e-4, rtol=0)
    # equality means something: the same text is another image with another negative one
    plain_images = sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1, 2, 3]), 1), model.encode(TEXTS), start(4))
    assert (ours.images_BCHW - plain_images).abs().amax(dim=(1, 2, 3)).gt(1e-3).tolist() == [True, False, True, False]


def test_a_search_that_affords_one_image_makes_the_plain_one(model: StableDiffusion3) -> None:
    algorithm: Any = SimpleNamespace(
        evaluation_grid=lambda n: SD3Schedule(n)(), estimate_grid=lambda n: SD3Schedule(n)()
    )
    rewards = Rewards(terms={"size": JpegSize(maximize=True)}, weights={"size": 1.0})
    found = search_images(model, ROWS, rewards, algorithm=algorithm, budget=6, num_steps=3)
    sampler = Sampler(model=model, grid=SD3Schedule(3)(), batch_sizes=BatchSizes.of(4))
    make = PromptImages(sampler=sampler, make=plain(sampler), images_per_prompt=1, seed=42)
    ((_, expected),) = make(ROWS)
    torch.testing.assert_close(torch.cat(found.images), expected.images_BCHW, atol=1e-5, rtol=0)


def by_hand(model: Any, x_BCHW: Tensor, t: float) -> Tensor:
    """Both branches from their texts, in two passes."""
    conditions, negative = model.encode(TEXTS[: len(x_BCHW)]), model.encode([n or "" for n in NEGATIVES[: len(x_BCHW)]])
    branches = [model._run(model.transformer, t, x_BCHW, part) for part in (conditions, negative)]
    return combined(model.guided(*branches))


@torch.no_grad()
def test_every_velocity_has_the_negative_text_in_its_other_branch(model: StableDiffusion3) -> None:
    x_BCHW, t = start(4), 0.6
    conditions, expected = encoded(model, ROWS), by_hand(model, x_BCHW, t)
    assert (expected - combined(model.velocity(x_BCHW, t, model.encode(TEXTS)))).abs().max() > 1e-3
    torch.testing.assert_close(combined(model.velocity(x_BCHW, t, conditions)), expected, atol=1e-5, rtol=0)
    with model.sampling():
        torch.testing.assert_close(combined(model.velocity(x_BCHW, t, conditions)), expected, atol=1e-5, rtol=0)
    policy, reference = (combined(v) for v in model.velocity_and_reference(x_BCHW, t, conditions))
    torch.testing.assert_close(policy, expected, atol=1e-5, rtol=0)
    # the reference is the model without its adapters
    assert (reference - expected).abs().max() > 1e-4
    factors = {name: weight.clone() for name, weight in model.trainable.items()}
    for weight in model.trainable.values():
        weight.zero_()
    torch.testing.assert_close(reference, by_hand(model, x_BCHW, t), atol=1e-5, rtol=0)
    for name, weight in model.trainable.items():
        weight.copy_(factors[name])


@torch.no_grad()
def test_so_has_guidance_that_is_not_linear_with_texts_of_unlike_lengths(tmp_path: Path) -> None:
    model = QWEN_IMAGE.make_model(QWEN_IMAGE.make_pipeline(tmp_path / "qwen"))
    x_BCHW, rows = QWEN_IMAGE.make_start(), [Prompt("a red circle", negative="word " * 80), Prompt("two blue squares")]
    conditions = encoded(model, rows)
    assert conditions.negative is not None
    assert conditions.negative.embeds_BLC.shape[1] > conditions.embeds_BLC.shape[1]
    alone = [model.encode([text]) for text in ("a red circle", "word " * 80, "two blue squares", "")]
    for row in range(2):
        branches = [model._run(model.transformer, 0.6, x_BCHW[row : row + 1], alone[2 * row + b]) for b in range(2)]
        expected = model.guided(*branches)
        for v in (
            model.velocity(x_BCHW, 0.6, conditions),
            *model.velocity_and_reference(x_BCHW, 0.6, conditions),
        ):
            torch.testing.assert_close(v[row : row + 1], expected, atol=1e-5, rtol=1e-4)


def test_rows_without_a_negative_text_have_the_empty_one_and_alone_they_are_as_ever(model: StableDiffusion3) -> None:
    assert encoded(model, TEXTS).negative is None
    conditions = encoded(model, ROWS)
    assert conditions.negative is not None
    for part in (
        conditions[1:2],
        conditions.take([3]),
        conditions[:2].cat(conditions[2:])[3:],
        conditions.to("cpu")[1:2],
    ):
        assert part.negative is not None
        assert torch.equal(part.negative.embeds_BLC, model.encode([""]).embeds_BLC)
    repeated = conditions[:2].repeat(2).negative
    assert repeated is not None
    assert repeated.keys == tuple(model.encode(["a blue square"] * 2 + [""] * 2).keys)
    assert conditions.num_bytes == 2 * model.encode(TEXTS).num_bytes
    # two branches that were joined are no rows with a negative text
    assert conditions.cat(conditions.negative).negative is None


def write_rows(path: Path) -> Path:
    rows = [{"prompt": prompt.text, "negative_prompt": prompt.negative} for prompt in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_trainer(weights: Path, directory: Path, *words: str) -> Any:
    path = write_rows(directory / "rows.jsonl")
    words = (
        f"prompts.path={path}",
        f"prompts.held_out={path}",
        "model.guidance_scale=3.0",
        "reward.golden=false",
        *words,
    )
    return build_trainer(load_config("train", make_overrides(weights, directory / "run", *words)))


RETRIES = ("algorithm/noise=retries", "algorithm.noise.where=below", "algorithm.noise.success=1e9")
ELITE = ("algorithm.noise.candidates=4", "algorithm.noise.estimate_steps=1")


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm/noise=elite", "algorithm.noise.elites=2", *ELITE),
        ("algorithm/noise=elite_step", "algorithm.noise.take=elites", "algorithm.noise.correction=none", *ELITE),
        RETRIES,
    ],
    ids=["start search", "step search", "retries"],
)
def test_in_a_run_no_branch_is_given_another_rows_text(
    words: tuple[str, ...], tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path, *words)
    keys = {text: trainer.model.encode([text]).keys[0] for text in {*TEXTS, *filter(None, NEGATIVES), ""}}
    allowed = {(keys[prompt.text], keys[prompt.negative or ""]) for prompt in ROWS}
    seen: set[tuple[int, int]] = set()
    without_text = Policy._without_text

    def overhear(self: Policy, x_BCHW: Tensor, conditions: Conditions) -> Any:
        others = without_text(self, x_BCHW, conditions)
        assert len(others[1]) == len(x_BCHW)
        seen.update(zip(conditions.keys, others[1].keys, strict=True))
        return others

    monkeypatch.setattr(Policy, "_without_text", overhear)
    trainer.step()
    of_iteration = {(keys[p.text], keys[p.negative or ""]) for p in as_prompts(trainer.prompts.at(0).asked)}
    assert seen == of_iteration
    trainer.evaluation()
    assert seen == allowed


def test_groups_that_are_made_again_keep_their_negative_text(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path, *RETRIES, "algorithm.noise.tries=1")
    samples = Samples.all_of(trainer.prompts.at(0), 3)
    conditions = encoded(trainer.model, samples.asked)
    made = Made(trainer.rollout(samples, conditions, trainer.start_noise(samples), 0), torch.full((6, 1), -1.0))
    made = trainer.retry(samples, Spread.evenly(6, 1), 0, made)
    again = Samples(samples.prompts, 6, tuple(trainer.algorithm.noise.row(row, 3, 1) for row in samples.rows))
    noise = trainer.start_noise.again(again, 0, [0, 1], 1)
    expected = trainer.rollout(again, conditions, noise, 0).images_BCHW
    torch.testing.assert_close(made.trajectories.images_BCHW, expected, atol=1e-5, rtol=0)
    without = trainer.rollout(again, trainer.model.encode(samples.texts), noise, 0).images_BCHW
    assert (expected - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    "words", [("algorithm=flow_grpo_fast",), ("algorithm=flow_grpo", "algorithm.objective.kl_coef=0.1")]
)
def test_rollout_and_update_agree_on_it(words: tuple[str, ...], tiny_weights: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    words = (*words, f"model.weights={tiny_weights}", "model.guidance_scale=3.0", f"prompts.path={path}")
    words = (*words, "runtime.device=cpu", "runtime.micro_batch=4", "adaptation.rank=4", "num_prompts=4")
    assert replayed(load_config("doctor", list(words))).deviation == 0


def test_memory_is_planned_and_texts_are_encoded_ahead_for_both_branches(tiny_weights: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    # five texts are held out, three of them trained on, too
    words = [f"prompts.path={path}", "model.guidance_scale=3.0", "reward.golden=false"]
    words += [f"model.condition_cache={tmp_path / 'conditions'}"]
    config = load_config("train", make_overrides(tiny_weights, tmp_path / "run", *words))
    trainer, parts = build_trainer(config), RunParts.read(config)
    _encode_ahead(parts, trainer)
    assert len(list((tmp_path / "conditions").rglob("*.safetensors"))) == 5 + 2 + 1
    planner = _planner(parts, load_rewards(parts)[0], trainer.world)
    assert planner.prompt == Prompt("two red triangles", negative="a blue square")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model=shapes"],
            "rows.jsonl:1: negative_prompt 'a blue square' is for guidance with a branch of its own, and "
            "model.guidance_scale=1 turns that off; raise it above 1, or leave this out",
        ),
        (["model=flux_miniature"], "models.flux.Flux has none that reads a text; leave it out"),
    ],
)
def test_where_no_branch_reads_it_the_row_is_refused_before_a_model_is_loaded(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgrpo.models.pipeline_model.PipelineModel._configs", None)
    path = write_rows(tmp_path / "rows.jsonl")
    for command, key in (("sample", "path"), ("evaluate", "held_out"), ("train", "path"), ("doctor", "path")):
        assert cli.main([command, *words, f"prompts.{key}={path}", "runtime.device=cpu"]) == cli.BAD_INPUT
        assert message in capsys.readouterr().err


def test_a_model_that_takes_none_refuses_them_when_it_is_asked_without_a_config() -> None:
    with pytest.raises(ValueError, match="Field has no branch of guidance for a negative prompt; leave it out"):
        encoded(Field(has_two_branches=True), ROWS)  # type: ignore[arg-type]
