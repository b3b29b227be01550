"""Both sides do the same work, a mistake in either shows, and what the driver adds to their functions is right."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.flow_grpo.agreement import Agreement, agreement
from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.peer import Peer
from benchmarks.flow_grpo.recipe import MICRO_BATCH, RECIPES, Job
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.their_update import TheirUpdate
from benchmarks.flow_grpo.theirs import FlowGRPO
from fastgrpo.start_noise import StartNoise
from fastgrpo.update import Update


@pytest.fixture
def check(job: Job, stand_in: Checkout, tmp_path: Path) -> Any:
    def run(recipe: str, overrides: str = "", theirs: str = "float32") -> Agreement:
        return agreement(
            stand_in, replace(job, recipe=recipe), tmp_path / "check", overrides.split(), Setting.parse(theirs)
        )

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often an iteration searched noise, and how often it replayed a share of its samples."""
    counted: Counter[str] = Counter()

    def count(cls: type, name: str) -> None:
        method = getattr(cls, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(cls, name, counting)

    count(StartNoise, "_scores")
    count(Update, "_accumulate")
    return counted


# smart is fast with milder noise and, in a check, with a search; reweight is without the penalty
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("full", ""), ("fast", ""), ("smart", ""), ("full_without_kl", "train.gradients=reweight")],
)
def test_both_sides_do_the_same_work(check: Any, calls: Counter[str], recipe: str, overrides: str) -> None:
    found = check(recipe, overrides)
    assert calls["_scores"] == (1 if recipe == "smart" else 0)
    assert calls["_accumulate"] == (0 if overrides else 1)
    assert found.ratio_deviation < 1e-6
    assert found.gradient_difference < 1e-5
    assert not found.trains_unconditional
    assert found.holds


@pytest.mark.parametrize(
    ("recipe", "overrides", "theirs", "expected"),
    [("full", "model.dtype=bfloat16", "float32", 0.03), ("fast", "", "bfloat16", 0.01)],
)
def test_half_precision_of_either_side_shows_and_is_allowed(
    check: Any, recipe: str, overrides: str, theirs: str, expected: float
) -> None:
    found = check(recipe, overrides, theirs)
    assert expected < found.gradient_difference < found.tolerance.gradient
    assert 1e-5 < found.ratio_deviation < found.tolerance.ratio


@pytest.mark.parametrize(
    ("recipe", "mistake"),
    [
        ("full", "algorithm.objective.kl_coef=0"),
        ("full_without_kl", "model.guidance_scale=4"),
        ("fast", "algorithm.dynamics.noise_level=0.7"),
        ("fast", "adaptation.alpha=9"),
    ],
)
def test_a_mistake_is_noticed_even_in_bfloat16(check: Any, recipe: str, mistake: str) -> None:
    found = check(recipe, f"{mistake} model.dtype=bfloat16")
    assert found.gradient_difference > 1.5 * found.tolerance.gradient
    assert not found.holds


def test_the_peer_trains_adapters_of_joint_attention_alone(job: Job, stand_in: Checkout) -> None:
    peer = Peer(stand_in, job, Setting())
    trained = {name for name, weight in peer.transformer.named_parameters() if weight.requires_grad}
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.transformer_blocks.") for name in trained}
    # the last block's text leads nowhere, and the first block's second attention is left alone
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj")
    assert modules == {
        *(f"0.attn.{name}" for name in (*image, *text, "to_add_out")),
        *(f"1.attn.{name}" for name in (*image, *text)),
    }
    assert len(peer.trained) == len(trained) == 2 * len(modules)
    layer = peer.transformer.base_model.model.transformer_blocks[0].attn.to_q
    assert (layer.r["default"], layer.scaling["default"]) == (job.size.lora_rank, 2.0)
    empty_embeds, empty_pooled = peer.encode([""])
    assert torch.equal(peer.empty_embeds, empty_embeds.expand(MICRO_BATCH, -1, -1))
    assert torch.equal(peer.empty_pooled, empty_pooled.expand(MICRO_BATCH, -1))


def test_a_peer_in_bfloat16_computes_in_it_over_float32_weights(job: Job, stand_in: Checkout) -> None:
    peer = Peer(stand_in, job, Setting("bfloat16"))
    assert {weight.dtype for weight in peer.transformer.parameters()} == {torch.float32}
    assert peer.pipeline.text_encoder.dtype == torch.bfloat16
    assert peer.pipeline.vae.dtype == torch.float32
    block = peer.transformer.base_model.model.transformer_blocks[0]
    seen: list[torch.dtype] = []
    block.attn.to_q.base_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    size = job.size.resolution // 8
    velocity = peer.transformer(
        hidden_states=torch.zeros(1, 16, size, size),
        timestep=torch.ones(1),
        encoder_hidden_states=peer.empty_embeds[:1],
        pooled_projections=peer.empty_pooled[:1],
        return_dict=False,
    )[0]
    assert seen == [torch.bfloat16]
    assert velocity.dtype == torch.float32


def test_a_compiled_peer_compiles_each_block(job: Job, stand_in: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: compiled.append((module, settings)))
    with torch._dynamo.config.patch(recompile_limit=8):
        peer = Peer(stand_in, job, Setting("float32", compiled=True))
        assert torch._dynamo.config.recompile_limit == 64
    blocks = peer.transformer.base_model.model.transformer_blocks
    assert compiled == [(block, {"dynamic": False}) for block in blocks]


@pytest.mark.parametrize("recipe", ["full", "fast"])
def test_an_iteration_of_theirs_steps_twice_on_policy_and_moves_weights_and_average(
    job: Job, stand_in: Checkout, recipe: str
) -> None:
    side = FlowGRPO(stand_in, replace(job, recipe=recipe), Setting())
    # the average moves at every eighth step: the second of these two is one
    side.update.global_step = 5
    (average, *_), (weight, *_) = side.peer.ema.ema_parameters, side.peer.trained
    before = average.clone()
    seen: list[dict[str, Tensor]] = []
    update, clip, limits = side.update, side.peer.accelerator.clip_grad_norm_, []

    def clipped(parameters: Any, max_norm: float) -> Tensor:
        limits.append(max_norm)
        return clip(parameters, max_norm)

    side.peer.accelerator.clip_grad_norm_ = clipped

    def watched(samples: dict[str, Tensor]) -> float:
        seen.append(samples)
        return update(samples)

    side.update = watched  # type: ignore[assignment]
    iteration = side()
    assert iteration.num_images == 2 * MICRO_BATCH
    assert iteration.ratio_deviation < 1e-6
    assert update.global_step == 7
    assert limits == [1.0, 1.0]
    assert {int(state["step"]) for state in side.peer.optimizer.state.values()} == {2}
    assert not torch.equal(weight, before)
    # min(decay, (1 + 7) / (10 + 7)) of it stays
    torch.testing.assert_close(average, before + (1 - 8 / 17) * (weight.detach() - before))
    (samples,) = seen
    kept = 10 if recipe == "full" else 3
    assert samples["latents"].shape[:2] == samples["next_latents"].shape[:2] == (2 * MICRO_BATCH, kept)
    assert torch.equal(samples["latents"][:, 1:], samples["next_latents"][:, :-1])
    # neighboring steps of the schedule, the same for all of a micro-batch
    times = side.peer.pipeline.scheduler.timesteps
    for batch in samples["timesteps"].split(MICRO_BATCH):
        place = int((times == batch[0, 0]).nonzero())
        assert torch.equal(batch, times[place : place + kept].expand(MICRO_BATCH, -1))
    assert samples["advantages"].shape == (2 * MICRO_BATCH, side.peer.recipe.num_trained_steps)
    assert samples["advantages"].double().mean(dim=0).abs().max() < 1e-6


def test_their_rewards_become_advantages_of_each_prompt(job: Job, stand_in: Checkout) -> None:
    side = FlowGRPO(stand_in, replace(job, recipe="fast"), Setting())
    tokenize = side.peer.pipeline.tokenizer
    ids = tokenize(["a red circle"] * 2 + ["a blue square"] * 2, padding="max_length", return_tensors="pt").input_ids
    waiting: list[Future[Any]] = [Future(), Future()]
    for future, scores in zip(waiting, ([1.0, 3.0], [5.0, 11.0]), strict=True):
        future.set_result(({"avg": scores}, {}))
    # means 2 and 8; the four rewards have mean 5 and variance (16 + 4 + 0 + 36) / 4 = 14
    expected = torch.tensor([-1.0, 1.0, -3.0, 3.0], dtype=torch.float64) / (14**0.5 + 1e-4)
    torch.testing.assert_close(side._advantages(ids, waiting), expected[:, None].expand(-1, 3))
    assert side.peer.tracker.seen == {}


def test_their_loss_by_hand() -> None:
    """Clipped at 1 +- .1: ratios 1.2 and .8, with advantages 1 and -7, which is clamped to -5."""
    log_prob_B = torch.tensor([1.2, 0.8]).log()
    means = iter((torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 2.0)))
    peer: Any = SimpleNamespace(
        recipe=replace(RECIPES["full"], clip_range=0.1, kl_coef=0.5),
        config=None,
        pipeline=None,
        transformer=SimpleNamespace(disable_adapter=torch.no_grad),
        compute_log_prob=lambda *_: (None, log_prob_B, next(means), torch.full((2, 1, 1, 1), 0.5)),
    )
    batch = {"log_probs": torch.zeros(2, 3), "advantages": torch.tensor([[0.0, 1.0], [0.0, -7.0]])}
    nothing: Any = (None, None)
    loss, ratio_B, logged = TheirUpdate(peer).loss(batch, 1, nothing)
    assert ratio_B.tolist() == pytest.approx([1.2, 0.8])
    # max(-1.2, -1.1) and max(4, 4.5)
    assert logged["policy_loss"].item() == pytest.approx((-1.1 + 4.5) / 2)
    # (3 - 2)^2 / (2 * .25)
    assert logged["kl_loss"].item() == pytest.approx(2.0)
    assert loss.item() == pytest.approx((-1.1 + 4.5) / 2 + 0.5 * 2.0)
    shares = [logged[name].item() for name in ("clipfrac", "clipfrac_gt_one", "clipfrac_lt_one")]
    assert shares == [1.0, 0.5, 0.5]
    assert logged["approx_kl"].item() == pytest.approx(log_prob_B.square().mean().item() / 2)
