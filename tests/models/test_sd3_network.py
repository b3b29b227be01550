"""Our forward pass of SD3's transformer is diffusers', value and gradient, for every kind of block."""

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fastgrpo.config import load_config
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.lora import LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.models.sd3 import SD3Network
from fastgrpo.types import Conditions

T = 0.5
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
KINDS = [
    pytest.param({"qk_norm": qk_norm, "dual_attention_layers": dual}, id=f"{qk_norm}-{len(dual)} dual")
    for qk_norm in (None, "rms_norm")
    for dual in ((), (0, 1))
]


def make_transformer(kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """Three blocks: the last drops its text tokens."""
    return random_module(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=24,
            caption_projection_dim=48,
            pooled_projection_dim=20,
            pos_embed_max_size=16,
            **kind,
        ),
        device="cpu",
        dtype=dtype,
        seed=0,
    )


def make_network(*, checkpointing: bool = False) -> SD3Network:
    return SD3Network(
        attention=attention_backend("sdpa"),
        compile=lambda function: function,
        checkpointing=checkpointing,
        modulations=Modulations(is_frozen=True),
    )


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditions]:
    generator = torch.Generator().manual_seed(1)
    x_BCHW, embeds_BLC, pooled_BC = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 12, 8), (2, 5, 24), (2, 20))
    )
    return x_BCHW, Conditions(embeds_BLC.to(dtype), pooled_BC.to(dtype), (0, 1))


def diffusers_velocity(transformer: SD3Transformer2DModel, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
    return transformer(
        hidden_states=x_BCHW.to(transformer.dtype),
        timestep=torch.full((len(x_BCHW),), 1000 * T),
        encoder_hidden_states=conditions.embeds_BLC,
        pooled_projections=conditions.pooled_BC,
        return_dict=False,
    )[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_is_that_of_diffusers(kind: dict[str, Any], dtype: torch.dtype) -> None:
    transformer, (x, conditions) = make_transformer(kind, dtype), make_inputs(dtype)
    ours, theirs = make_network()(transformer, x, T, conditions), diffusers_velocity(transformer, x, conditions)
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_diffusers(kind: dict[str, Any], checkpointing: bool) -> None:
    # in double precision, which rounding does not blur
    transformer, (x, conditions) = make_transformer(kind, torch.float64), make_inputs(torch.float64)
    # attention and feed-forward
    targets = tuple(load_config("train", ["adaptation=lora_flux"]).adaptation.targets)
    adaptation = LoRA(rank=2, targets=targets)(transformer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in adaptation.trainable.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    network = make_network(checkpointing=checkpointing)
    adaptation.stack(network.stacks(transformer))
    weights = list(adaptation.trainable.values())
    ours = torch.autograd.grad(network(transformer, x, T, conditions), weights, cotangent)
    # diffusers' attention takes the same layers, adapters and all
    theirs = torch.autograd.grad(diffusers_velocity(transformer, x, conditions), weights, cotangent)
    for name, our, their in zip(adaptation.trainable, ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-5 * their.abs().max(), name
        # what the last block's text tokens ask is thrown away
        assert their.any() == ("2.attn.add_q_proj" not in name)


def test_queries_keys_and_values_of_each_attention_are_one_product() -> None:
    transformer = make_transformer({"dual_attention_layers": (1,)})
    LoRA(rank=2)(transformer).stack(make_network().stacks(transformer))
    blocks = transformer.transformer_blocks
    for block in blocks:
        assert len({id(getattr(block.attn, name).stack) for name in ("to_q", "to_k", "to_v")}) == 1
        assert len({id(getattr(block.attn, f"add_{name}_proj").stack) for name in "qkv"}) == 1
    # nobody trains these
    assert len({id(getattr(blocks[1].attn2, name).stack) for name in ("to_q", "to_k", "to_v")}) == 1
    # each block has stacks of its own
    assert len({id(block.attn.to_q.stack) for block in blocks}) == len(blocks)


@torch.no_grad()
def test_kept_modulations_change_no_bit() -> None:
    transformer, (x, conditions) = make_transformer({"qk_norm": "rms_norm"}), make_inputs()
    network = make_network()
    first = network(transformer, x, T, conditions)
    for block in transformer.transformer_blocks:
        # they are not computed again
        block.norm1.linear.weight.fill_(float("nan"))
    assert torch.equal(network(transformer, x, T, conditions), first)
    assert network(transformer, x, 0.4, conditions).isnan().all()
