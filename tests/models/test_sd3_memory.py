"""What SD3.5-medium keeps for its backward pass at full size, counted over FakeTensors: no memory, no arithmetic."""

from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.config import load_config
from fastgrpo.memory.byte_count import LiveBytes
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import SD3Network
from fastgrpo.pieces import build
from fastgrpo.types import Conditions

WIDTH, NUM_BLOCKS, IMAGE_TOKENS, TEXT_TOKENS = 1536, 24, 1024, 205
BF16 = 2

# (transformer, x [B, C, H, W], conditions) -> v [B, C, H, W]
Forward = Callable[[SD3Transformer2DModel, Tensor, Conditions], Tensor]


def make_transformer() -> SD3Transformer2DModel:
    """SD3.5-medium in bfloat16 with Flow-GRPO's adapters."""
    architecture = build(load_config("train", ["model=sd35_medium"]).model.architecture)
    transformer = architecture.make(
        "transformer", SD3Transformer2DModel, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    LoRA()(transformer)
    return transformer


def saved_bytes(forward: Forward, num_sequences: int) -> int:
    """Bytes alive between forward and backward at 512x512, less the output."""
    with FakeTensorMode():
        transformer = make_transformer()
        conditions = Conditions(
            torch.empty(num_sequences, TEXT_TOKENS, 4096, dtype=torch.bfloat16),
            torch.empty(num_sequences, 2048, dtype=torch.bfloat16),
            tuple(range(num_sequences)),
        )
        x_BCHW = torch.empty(num_sequences, 16, 64, 64, dtype=torch.bfloat16)
        with LiveBytes() as counter:
            v_BCHW = forward(transformer, x_BCHW, conditions)
            return counter.live - v_BCHW.untyped_storage().nbytes()


def diffusers_forward(transformer: SD3Transformer2DModel, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
    t_B = torch.full((len(x_BCHW),), 500.0)
    return transformer.eval()(x_BCHW, conditions.embeds_BLC, conditions.pooled_BC, t_B, return_dict=False)[0]


def our_forward(*, checkpointing: bool) -> Forward:
    network = SD3Network(
        attention=attention_backend("sdpa"),
        compile=lambda function: function,
        checkpointing=checkpointing,
        modulations=Modulations(is_frozen=True),
    )
    return lambda transformer, x_BCHW, conditions: network(transformer, x_BCHW, 0.5, conditions)


@pytest.mark.slow
def test_diffusers_forward_of_nine_sequences_keeps_eighteen_gigabytes() -> None:
    assert saved_bytes(diffusers_forward, 9) == pytest.approx(18.2e9, rel=0.02)


def test_ours_keeps_a_sixth_less() -> None:
    """15.1 GB, as counted: where a saved tensor comes back, so do these bytes."""
    assert saved_bytes(our_forward(checkpointing=False), 9) == pytest.approx(15.1e9, rel=0.02)


@pytest.mark.slow
def test_with_checkpointing_it_is_the_tokens_between_blocks() -> None:
    """1.7 GB for 18 sequences: what goes into each block, and what its modulations take."""
    between_blocks = 18 * NUM_BLOCKS * (IMAGE_TOKENS + TEXT_TOKENS) * WIDTH * BF16
    assert between_blocks == pytest.approx(1.63e9, rel=0.01)
    assert saved_bytes(our_forward(checkpointing=True), 18) == pytest.approx(between_blocks, rel=0.06)
