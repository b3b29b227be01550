"""Weights that are spread over ranks train as those of one process do: velocities, gradients, steps and averages.

One process with whole weights is one path, 1, 2 and 4 ranks with parts of them the other; in float64 they agree to
1e-10.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastgrpo.compile.blocks import Uncompiled, num_compilations
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.traffic import Traffic
from fastgrpo.distributed.world import World
from fastgrpo.ema import EMA
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.flux import Flux
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.types import Conditions
from fastgrpo_kernels import GuidedVelocity
from tests import tiny_flux
from tests.ranks import Ranks, ranks_of_module
from tests.tiny import PROMPTS

Array = np.ndarray[Any, Any]

T = 0.7
TEXTS = PROMPTS[:5]
TOLERANCE = 1e-10
# with Adam's own 1e-8 what is zero but for rounding, as the gradient by a bias of keys is, becomes a step of 1e-7
EPS = 1e-4
FULL = FullFineTuning()
SHARDED = FullFineTuning(rollout_weights="sharded")
BY_NODE = FullFineTuning(shard_over="node")
CHECKPOINTING = (("checkpointing", True),)

on_ranks = ranks_of_module()
unjoined = ranks_of_module(joined=False)


@dataclass(frozen=True)
class Case:
    """A model and how it is spread; ``ranks_of_node`` is what torchrun would say."""

    weights: Path
    piece: FullFineTuning = FULL
    settings: tuple[tuple[str, Any], ...] = ()
    ranks_of_node: int = 1

    def make(self) -> PipelineModel:
        settings: dict[str, Any] = {"weights": str(self.weights), "resolution": 64, "dtype": "float64"}
        settings |= dict(self.settings)
        if self.weights.name == "flux":
            return Flux(adaptation=self.piece, guidance_scale=3.5, max_sequence_length=7, **settings)
        return StableDiffusion3(adaptation=self.piece, guidance_scale=4.5, use_t5=False, **settings)


@dataclass(frozen=True)
class Trained:
    """What two steps of training show: velocities of a rank's own samples, and whole weights."""

    velocities_BSCHW: Array
    reference_BCHW: Array
    gradients: dict[str, Array]
    grad_norms: list[float]
    weights: dict[str, Array]
    averages: dict[str, Array]


def whole(weight: Tensor) -> Array:
    """As an array, since tensors of another process end with it."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().numpy().copy()


def guided(v_BCHW: Tensor | GuidedVelocity) -> Tensor:
    """In float64, which the kernels have no use for."""
    if isinstance(v_BCHW, Tensor):
        return v_BCHW
    return v_BCHW.unconditional + v_BCHW.scale * (v_BCHW.conditional - v_BCHW.unconditional)


def inputs(model: PipelineModel, world: World) -> tuple[Tensor, Conditions]:
    """Latents and conditions of this rank's samples: of five, one or two."""
    rows = Spread.evenly(len(TEXTS), world.size).rows[world.rank]
    x_BCHW = torch.randn(len(TEXTS), 16, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x_BCHW[list(rows)], model.encode(TEXTS).take(rows)


def accumulate(model: PipelineModel, world: World) -> None:
    """Leave gradients of three backward passes."""
    x_BCHW, conditions = inputs(model, world)
    for factor in (1.0, 0.5, 0.7):
        policy, reference = (guided(v) for v in model.velocity_and_reference(x_BCHW, T, conditions))
        with nullcontext() if factor == 0.7 else model.accumulating():
            (factor * (policy - 1).square().sum() + (policy - reference).square().sum()).backward()
    model.sum_gradients(lambda gradients: world.sum_(gradients, "gradients"))


def train(world: World, case: Case) -> Trained:
    if world.group is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(case.ranks_of_node)
    model = case.make()
    model.shard(world.group)
    weights = list(model.trainable.values())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, eps=EPS, fused=True)
    ema = EMA(model.trainable, decay=0.5)
    velocities, grad_norms = [], []
    gradients: dict[str, Array] = {}
    for _ in range(2):
        with model.gathered(), model.sampling():
            velocities.append(guided(model.velocity(*at(T, inputs(model, world)))))
        accumulate(model, world)
        gradients = gradients or {n: whole(w.grad) for n, w in model.trainable.items() if w.grad is not None}
        grad_norms.append(float(whole(nn.utils.clip_grad_norm_(weights, 100.0))))
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
    with torch.no_grad():
        reference = guided(model.velocity_and_reference(*at(T, inputs(model, world)))[1])
    with ema.applied(), model.gathered(), model.sampling():
        velocities.append(guided(model.velocity(*at(T, inputs(model, world)))))
    parts = {name: whole(weight) for name, weight in model.trainable.items()}
    averages = {name: whole(average) for name, average in ema.averages.items()}
    return Trained(whole(torch.stack(velocities, dim=1)), whole(reference), gradients, grad_norms, parts, averages)


def at(t: float, of_rank: tuple[Tensor, Conditions]) -> tuple[Tensor, float, Conditions]:
    return of_rank[0], t, of_rank[1]


def assert_agree(ranks: list[Trained], alone: Trained) -> None:
    """Each rank has trained its samples as one process with whole weights does."""
    for name in ("velocities_BSCHW", "reference_BCHW"):
        found = np.concatenate([getattr(rank, name) for rank in ranks])
        np.testing.assert_allclose(found, getattr(alone, name), atol=TOLERANCE, rtol=0)
    for rank in ranks:
        assert rank.grad_norms == ranks[0].grad_norms
        assert rank.grad_norms == pytest.approx(alone.grad_norms, rel=TOLERANCE)
        for kind in ("gradients", "weights", "averages"):
            found, expected = getattr(rank, kind), getattr(alone, kind)
            assert found.keys() == expected.keys()
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, rtol=TOLERANCE)
    # the steps were no small ones, and the average is not the weights
    assert np.abs(alone.velocities_BSCHW[:, 0] - alone.velocities_BSCHW[:, 1]).max() > 1e-3
    assert max(np.abs(alone.weights[name] - average).max() for name, average in alone.averages.items()) > 1e-4


@cache
def trained_alone(weights: Path) -> Trained:
    """What one process with whole weights computes: no mesh, no shards."""
    return train(World(), Case(weights))


@pytest.fixture(scope="module")
def flux_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.make_pipeline(tmp_path_factory.mktemp("weights") / "flux")


@pytest.mark.parametrize(
    ("network", "num_ranks", "piece", "settings", "ranks_of_node"),
    [
        pytest.param("sd3", 1, FULL, (), 1, id="sd3-1-rank"),
        pytest.param("sd3", 4, FULL, (), 4, id="sd3-4-ranks"),
        pytest.param("sd3", 2, SHARDED, CHECKPOINTING, 2, id="sd3-2-ranks-sharded-rollout-checkpointing"),
        pytest.param("sd3", 4, BY_NODE, CHECKPOINTING, 2, id="sd3-2-nodes-of-2-ranks-checkpointing"),
        pytest.param("flux", 2, FULL, CHECKPOINTING, 2, id="flux-2-ranks-checkpointing"),
        pytest.param("flux", 2, BY_NODE, (), 1, id="flux-2-nodes-of-1-rank"),
    ],
)
def test_ranks_with_parts_of_the_weights_train_as_one_process_with_all(
    network: str,
    num_ranks: int,
    piece: FullFineTuning,
    settings: tuple[tuple[str, Any], ...],
    ranks_of_node: int,
    tiny_weights: Path,
    flux_weights: Path,
    on_ranks: Ranks,
) -> None:
    weights = tiny_weights if network == "sd3" else flux_weights
    alone = trained_alone(weights)
    ranks: list[Trained] = on_ranks(num_ranks, train, Case(weights, piece, settings, ranks_of_node))
    assert_agree(ranks, alone)


def exchanges_of_gradients(world: World, case: Case) -> tuple[int, int, int]:
    """Units of weights, and how often gradients are summed within nodes and over them in one accumulation."""
    os.environ["LOCAL_WORLD_SIZE"] = str(case.ranks_of_node)
    model = case.make()
    model.shard(world.group)
    with Traffic() as traffic:
        accumulate(model, world)
    kinds: Counter[str] = Counter()
    for exchange, calls in traffic.take().items():
        kinds[exchange.kind] += calls
    num_units = sum(isinstance(module, FSDPModule) for module in model.adaptation.transformer.modules())
    return num_units, kinds["reduce_scatter"], kinds["all_reduce"]


def test_nodes_with_copies_exchange_a_gradient_once_a_step_and_not_in_each_pass(
    tiny_weights: Path, on_ranks: Ranks
) -> None:
    for num_units, within, over in on_ranks(4, exchanges_of_gradients, Case(tiny_weights, BY_NODE, (), 2)):
        assert (within, over) == (3 * num_units, num_units)


def train_two_of_four(world: World, case: Case) -> Trained | None:
    group: Any = dist.new_group([0, 1])
    if world.rank > 1:
        return None
    with pytest.raises(ValueError, match=r"got 2 of 4 ranks, 1 a node; use adaptation\.shard_over=all"):
        Case(case.weights, BY_NODE).make().shard(group)
    return train(World(rank=world.rank, size=2, group=group, control=world.control), case)


def test_ranks_that_only_score_have_no_part(tiny_weights: Path, on_ranks: Ranks) -> None:
    alone = trained_alone(tiny_weights)
    first, second, *others = on_ranks(4, train_two_of_four, Case(tiny_weights))
    assert others == [None, None]
    for rank in (first, second):
        for name, weight in alone.weights.items():
            np.testing.assert_allclose(rank.weights[name], weight, atol=TOLERANCE, rtol=TOLERANCE)


class Traced(Uncompiled):
    """Blocks as torch.compile traces them, run by PyTorch's own kernels: without a compiler's minutes."""

    def __call__(self, function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")


def gradients_of_traced(world: World, case: Case) -> tuple[int, dict[str, Array]]:
    # what an earlier test traced in this process
    torch._dynamo.reset()
    before = num_compilations()
    model = case.make()
    model.shard(world.group)
    accumulate(model, world)
    found = {name: whole(weight.grad) for name, weight in model.trainable.items() if weight.grad is not None}
    return num_compilations() - before, found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_traced_blocks_find_gathered_weights(checkpointing: bool, tiny_weights: Path, on_ranks: Ranks) -> None:
    alone = trained_alone(tiny_weights)
    case = Case(tiny_weights, settings=(("compile", Traced()), ("checkpointing", checkpointing)))
    for num_graphs, gradients in on_ranks(2, gradients_of_traced, case):
        assert num_graphs > 0
        assert gradients.keys() == alone.gradients.keys()
        for name, gradient in alone.gradients.items():
            np.testing.assert_allclose(gradients[name], gradient, atol=TOLERANCE, rtol=TOLERANCE)


def num_bytes_held(world: World, case: Case) -> dict[str, int]:
    """Bytes of this rank's part, by kind, after a step."""
    if world.group is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(case.ranks_of_node)
    model = case.make()
    model.shard(world.group)
    weights = list(model.trainable.values())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    ema = EMA(model.trainable, decay=0.5)
    accumulate(model, world)
    optimizer.step()
    held: dict[str, list[Tensor]] = {
        "weights": [*weights],
        "gradients": [weight.grad for weight in weights if weight.grad is not None],
        "moments": [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")],
        "averages": list(ema.averages.values()),
    }
    return {kind: num_bytes(tensors) for kind, tensors in held.items()}


def num_bytes(tensors: list[Tensor]) -> int:
    """Of the memory that they are in, which some share."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in own}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("num_ranks", "piece", "ranks_of_node", "num_parts"),
    [(4, FULL, 4, 4), (4, BY_NODE, 2, 2)],
    ids=["4-ranks", "2-nodes-of-2-ranks"],
)
def test_a_rank_holds_its_part_alone(
    num_ranks: int,
    piece: FullFineTuning,
    ranks_of_node: int,
    num_parts: int,
    tiny_weights: Path,
    on_ranks: Ranks,
) -> None:
    alone = num_bytes_held(World(), Case(tiny_weights))
    ranks = on_ranks(num_ranks, num_bytes_held, Case(tiny_weights, piece, (), ranks_of_node))
    assert alone["moments"] == 2 * alone["weights"]
    # all first dimensions of this model can be divided by 4
    assert ranks == [{kind: count // num_parts for kind, count in alone.items()}] * num_ranks


def velocity_calls(world: World, case: Case) -> list[bool]:
    """Whether ranks must keep step: before, while and after weights are gathered.  Rank 1 calls once more inside."""
    model = case.make()
    model.shard(world.group)
    x_BCHW, conditions = inputs(model, world)
    in_lockstep = [model.in_lockstep]
    with model.gathered(), model.gathered(), model.sampling():
        in_lockstep.append(model.in_lockstep)
        if not model.in_lockstep:
            for _ in range(1 + world.rank):
                model.velocity(x_BCHW, T, conditions)
    return [*in_lockstep, model.in_lockstep]


def test_a_rank_that_has_gathered_the_weights_waits_for_nobody(tiny_weights: Path, on_ranks: Ranks) -> None:
    assert on_ranks(2, velocity_calls, Case(tiny_weights)) == [[True, False, True]] * 2
    assert on_ranks(2, velocity_calls, Case(tiny_weights, SHARDED)) == [[True] * 3] * 2
    assert on_ranks(1, velocity_calls, Case(tiny_weights)) == [[False] * 3]
    assert velocity_calls(World(), Case(tiny_weights)) == [False] * 3


def small_steps(world: World, case: Case) -> tuple[dict[str, Array], float, str]:
    """What four steps of 1e-6 leave of the weights in bfloat16, the average distance, and the type of a velocity."""
    model = case.make()
    model.shard(world.group)
    weights = list(model.trainable.values())
    before = {name: whole(weight) for name, weight in model.trainable.items()}
    optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0, fused=True)
    for _ in range(4):
        accumulate(model, world)
        optimizer.step()
        optimizer.zero_grad()
    after = {name: whole(weight) for name, weight in model.trainable.items()}
    moved = [np.abs(after[name] - before[name]).max() for name in after]
    with model.gathered(), torch.no_grad():
        v_BCHW = guided(model.velocity(*at(T, inputs(model, world))))
    return after, float(np.max(moved)), str(v_BCHW.dtype)


def test_steps_too_small_for_bfloat16_are_kept_by_one_process_and_by_two_ranks(
    tiny_weights: Path, on_ranks: Ranks, unjoined: Ranks
) -> None:
    case = Case(tiny_weights, settings=(("dtype", "bfloat16"),))
    ((alone, distance, dtype),) = unjoined(1, small_steps, case)
    assert dtype == "torch.bfloat16"
    # Adam's steps are of the size of the learning rate; a weight of 0.1 has neighbours at 5e-4 in bfloat16
    assert distance == pytest.approx(4e-6, rel=0.2)
    assert {weight.dtype for weight in alone.values()} == {np.dtype("float32")}
    for weights, _, _ in on_ranks(2, small_steps, case):
        # gradients are rounded to bfloat16 on each rank before they are added up, and Adam takes their sign
        apart = [np.abs(weights[name] - alone[name]).mean() for name in alone]
        assert np.mean(apart) < 4e-7


def export(world: World, case: Case, directory: Path) -> None:
    model = case.make()
    model.shard(world.group)
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=1e-3, eps=EPS, fused=True)
    accumulate(model, world)
    optimizer.step()
    model.save_merged(directory)


def test_shards_are_exported_whole(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    case = Case(tiny_weights)
    export(World(), case, tmp_path / "alone")
    on_ranks(2, export, case, tmp_path / "ranks")
    alone, ranks = (
        SD3Transformer2DModel.from_pretrained(tmp_path / name / "transformer", dtype=torch.float64).state_dict()
        for name in ("alone", "ranks")
    )
    base = SD3Transformer2DModel.from_pretrained(tiny_weights / "transformer", dtype=torch.float64).state_dict()
    assert alone.keys() == ranks.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(ranks[name], weight, atol=TOLERANCE, rtol=0)
    assert (alone["proj_out.weight"] - base["proj_out.weight"]).abs().max() > 5e-4
    names = {path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*")}
    assert {path.relative_to(tmp_path / "ranks") for path in (tmp_path / "ranks").rglob("*")} == names


def lossy_velocity(world: World, case: Case) -> Array:
    model = case.make()
    model.shard(world.group)
    with model.gathered(), model.sampling(lossy=True):
        return whole(guided(model.velocity(*at(T, inputs(model, world)))))


def test_fp8_is_made_of_gathered_weights(tiny_weights: Path, on_ranks: Ranks) -> None:
    settings = (("dtype", "float32"), ("lossy", Fp8()))
    alone = lossy_velocity(World(), Case(tiny_weights, settings=settings))
    exact = lossy_velocity(World(), Case(tiny_weights, settings=(("dtype", "float32"),)))
    ranks = np.concatenate(on_ranks(2, lossy_velocity, Case(tiny_weights, settings=settings)))
    np.testing.assert_allclose(ranks, alone, atol=1e-5)
    assert np.abs(alone - exact).max() > 1e-3


def refusal(world: World, case: Case) -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(case.ranks_of_node)
    with pytest.raises(ValueError, match="use") as refused:
        case.make().shard(world.group)
    return str(refused.value)


class Graphs(Uncompiled):
    """As compile=graphs, which needs a GPU, makes something else of the forward pass."""

    def forward(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs)


@pytest.mark.parametrize(
    ("piece", "settings", "ranks_of_node", "message"),
    [
        (BY_NODE, (), 4, "got 2 of 2 ranks, 4 a node; use adaptation.shard_over=all"),
        (SHARDED, (("lossy", Fp8()),), 2, "use adaptation.rollout_weights=gathered"),
        (FULL, (("compile", Graphs()),), 2, "use compile=blocks"),
    ],
    ids=["nodes", "lossy", "graphs"],
)
def test_what_cannot_be_spread_is_refused(
    piece: FullFineTuning,
    settings: tuple[tuple[str, Any], ...],
    ranks_of_node: int,
    message: str,
    tiny_weights: Path,
    on_ranks: Ranks,
) -> None:
    case = Case(tiny_weights, piece, (("dtype", "float32"), *settings), ranks_of_node)
    assert [message in said for said in on_ranks(2, refusal, case)] == [True, True]


@pytest.mark.parametrize("setting", [{"shard_over": "rank"}, {"rollout_weights": "both"}])
def test_an_unknown_choice_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"adaptation.{next(iter(setting))} must be .* or .*, got"):
        FullFineTuning(**setting)


def sum_lora(world: World, case: Case) -> tuple[int, dict[str, Array]]:
    """How often ranks exchange something, and the gradients; only rank 0 has samples where ``case`` has one a node."""
    adaptation = LoRA(rank=4)
    model = StableDiffusion3(
        weights=str(case.weights), adaptation=adaptation, resolution=64, use_t5=False, dtype="float64"
    )
    model.shard(world.group)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    before = world.num_exchanges
    if world.rank < case.ranks_of_node:
        rows = World(rank=world.rank, size=case.ranks_of_node)
        guided(model.velocity(*at(T, inputs(model, rows)))).square().sum().backward()
    model.sum_gradients(lambda gradients: world.sum_(gradients, "gradients"))
    found = {name: whole(weight.grad) for name, weight in model.trainable.items() if weight.grad is not None}
    return world.num_exchanges - before, found


@pytest.mark.parametrize("ranks_with_samples", [1, 2])
def test_gradients_of_adapters_are_summed_in_one_exchange(
    ranks_with_samples: int, tiny_weights: Path, on_ranks: Ranks
) -> None:
    _, alone = sum_lora(World(), Case(tiny_weights))
    for exchanges, found in on_ranks(2, sum_lora, Case(tiny_weights, ranks_of_node=ranks_with_samples)):
        assert exchanges == 1
        assert found.keys() == alone.keys()
        for name, gradient in alone.items():
            np.testing.assert_allclose(found[name], gradient, atol=TOLERANCE, rtol=TOLERANCE)
    assert max(np.abs(gradient).max() for gradient in alone.values()) > 1e-2
