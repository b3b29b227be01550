"""Z-Image: image and text in one stream, over diffusers' ZImageTransformer2DModel.  arXiv:2511.22699.

    s1, g1, s2, g2 = modulation(t)                             of each block, linear in the embedding of time
    x <- x + tanh(g1) * rms(attention(rms(x) * (1 + s1)))
    x <- x + tanh(g2) * rms(W2 (silu(W1 y) * W3 y))            y = rms(x) * (1 + s2)

A few such blocks see the image alone, as many without modulation the text alone, and the others see both.  The network
is told 1 - t and predicts image - noise.  Image and text are each filled up by a learned token to a multiple of 32
tokens, which are all seen.  Text token i stands at (1 + i, 0, 0), and the image behind the M' tokens of its own text,
at (1 + M', row, column): so each sample has a rotation of its own.

Its authors write guidance as c + s (c - u): guidance_scale is 1 + s, and the text of u is empty.
Letters: B samples, L image tokens, M text tokens, N = L + M, C width of a token, D width of a head, E of a modulation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.feed_forward import swiglu
from fastgrpo.models.blocks.heads import self_heads
from fastgrpo.models.blocks.layout import blocks_of
from fastgrpo.models.blocks.modulation import normed, parts
from fastgrpo.models.blocks.network import BlockNetwork, exact_times
from fastgrpo.models.blocks.patches import patched, unpatched
from fastgrpo.models.blocks.rotary import Rotation, complex_rotation, rotated
from fastgrpo.models.low_rank import projected
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.text_lengths import refuse_longer
from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions, Time

_PATCH = 2
# of the layers of patches of 2 x 2 latent pixels in one frame
_KEY = "2-1"
# image and text are filled up to a multiple of it
_MULTIPLE = 32


def modulated_block(
    block: Any, x_BNC: Tensor, modulation_BE: Tensor, turns: Rotation, lengths_B: Tensor | None, attention: Attention
) -> Tensor:
    """Tokens after a block of the image, or of image and text; ``lengths_B`` of them are seen of each sample."""
    scale, gate, ff_scale, ff_gate = parts(modulation_BE, 4)
    y_BNC = _rms(x_BNC, block.attention_norm1) * (1 + scale)
    x_BNC = x_BNC + gate.tanh() * _attended(block, y_BNC, turns, lengths_B, attention)
    y_BNC = _rms(x_BNC, block.ffn_norm1) * (1 + ff_scale)
    return x_BNC + ff_gate.tanh() * _fed_forward(block, y_BNC)


def text_block(block: Any, x_BMC: Tensor, turns: Rotation, lengths_B: Tensor, attention: Attention) -> Tensor:
    """Text tokens after a block that time does not modulate."""
    x_BMC = x_BMC + _attended(block, _rms(x_BMC, block.attention_norm1), turns, lengths_B, attention)
    return x_BMC + _fed_forward(block, _rms(x_BMC, block.ffn_norm1))


def _attended(block: Any, y_BNC: Tensor, turns: Rotation, lengths_B: Tensor | None, attention: Attention) -> Tensor:
    attn = block.attention
    q, k, v = self_heads(attn, y_BNC)
    seen_BNC = attention(rotated(q, turns), rotated(k, turns), v, lengths_B).flatten(2)
    return _rms(attn.to_out[0](seen_BNC), block.attention_norm2)


def _fed_forward(block: Any, y_BNC: Tensor) -> Tensor:
    hidden = swiglu(*projected(_feed_forward_stack(block), y_BNC))
    return _rms(block.feed_forward.w2(hidden), block.ffn_norm2)


def _feed_forward_stack(block: Any) -> tuple[nn.Module, nn.Module]:
    return block.feed_forward.w1, block.feed_forward.w3


def _rms(x_BNC: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x_BNC, x_BNC.shape[-1:], norm.weight, norm.eps)


@dataclass(frozen=True)
class _Turns:
    """Cosines and sines [2, ...]: of each position of the first axis, of image tokens by the others, of text tokens.

    ``is_image_L`` says of image tokens which of them fill nothing up.
    """

    first_2PD: Tensor
    others_2LD: Tensor
    text_2MD: Tensor
    is_image_L: Tensor

    def of_image(self, num_text_B: Tensor) -> Tensor:
        """[2, B, L, D], of images behind as many text tokens."""
        places_BL = (1 + num_text_B)[:, None] * self.is_image_L
        others_2BLD = self.others_2LD[:, None].expand(-1, len(places_BL), -1, -1)
        return torch.cat([self.first_2PD[:, places_BL], others_2BLD], dim=3)

    def of_both(self, image_2BLD: Tensor) -> Tensor:
        """[2, B, N, D]."""
        return torch.cat([image_2BLD, self.text_2MD[:, None].expand(-1, image_2BLD.shape[1], -1, -1)], dim=2)


class ZImageNetwork(BlockNetwork):
    blocks = (modulated_block, text_block)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # by text tokens, rows and columns
        self._turns: dict[tuple[int, int, int], _Turns] = {}

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        yield from super().stacks(transformer)
        for _, block in blocks_of(transformer):
            yield _feed_forward_stack(block)

    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Of each block of the image, of each block of both, then of the output."""
        embedding_BC = transformer.t_embedder((1 - exact_times(t, pooled_BC)) * transformer.t_scale).to(pooled_BC.dtype)
        for block in chain(transformer.noise_refiner, transformer.layers):
            yield block.adaLN_modulation(embedding_BC)
        yield transformer.all_final_layer[_KEY].adaLN_modulation(embedding_BC)

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        num_text, (height, width) = embeds_BMC.shape[1], x_BCHW.shape[-2:]
        assert num_text % _MULTIPLE == 0
        num_text_B = _filled(lengths_B)
        x_BLC = transformer.all_x_embedder[_KEY](patched(x_BCHW.to(embeds_BMC.dtype), channels_last=True))
        num_image = x_BLC.shape[1]
        filling_BLC = transformer.x_pad_token.expand(len(x_BLC), _filled(num_image) - num_image, -1)
        x_BLC = torch.cat([x_BLC, filling_BLC], dim=1)
        turns = self._turns_of(transformer, num_text, height // _PATCH, width // _PATCH, x_BCHW.device)
        image_2BLD = turns.of_image(num_text_B)
        modulations = iter(modulations_BE)
        for block in transformer.noise_refiner:
            x_BLC = self.run(modulated_block, block, x_BLC, next(modulations), image_2BLD.unbind(), None)
        is_text_BM = torch.arange(num_text, device=lengths_B.device) < lengths_B[:, None]
        norm, linear = transformer.cap_embedder
        context_BMC = torch.where(is_text_BM[:, :, None], linear(_rms(embeds_BMC, norm)), transformer.cap_pad_token)
        for block in transformer.context_refiner:
            context_BMC = self.run(text_block, block, context_BMC, turns.text_2MD.unbind(), num_text_B)
        x_BNC = torch.cat([x_BLC, context_BMC], dim=1)
        both_turns = turns.of_both(image_2BLD).unbind()
        lengths_B = x_BLC.shape[1] + num_text_B
        for block in transformer.layers:
            x_BNC = self.run(modulated_block, block, x_BNC, next(modulations), both_turns, lengths_B)
        (scale,) = parts(next(modulations), 1)
        output_BLC = transformer.all_final_layer[_KEY].linear(normed(x_BNC[:, :num_image]) * (1 + scale))
        return -unpatched(output_BLC, height, width, channels_last=True)

    def _turns_of(self, transformer: Any, num_text: int, rows: int, columns: int, device: torch.device) -> _Turns:
        key = (num_text, rows, columns)
        if key not in self._turns:
            rope = transformer.rope_embedder
            tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
            first_2PD, *others = [torch.stack(complex_rotation(table)) for table in tables]
            filling = (0, _filled(rows * columns) - rows * columns)
            row_L = F.pad(torch.arange(rows).repeat_interleave(columns), filling)
            column_L = F.pad(torch.arange(columns).repeat(rows), filling)
            origin_M = torch.zeros(num_text, dtype=torch.int64)
            turns = (
                first_2PD,
                _at(others, row_L, column_L),
                _at([first_2PD, *others], 1 + torch.arange(num_text), origin_M, origin_M),
                torch.arange(len(row_L)) < rows * columns,
            )
            self._turns[key] = _Turns(*(on_device(part, device) for part in turns))
        return self._turns[key]


def _filled(count: Any) -> Any:
    """The least multiple that holds as many tokens: of a number, or of each in a tensor."""
    return (count + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE


def _at(axes: Sequence[Tensor], *places: Tensor) -> Tensor:
    """Of tokens by their place on each axis, each of which turns channels of its own."""
    return torch.cat([axis_2PD[:, place] for axis_2PD, place in zip(axes, places, strict=True)], dim=2)


class ZImage(PipelineModel):
    """``FlowModel`` over a ZImagePipeline."""

    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    network_class = ZImageNetwork
    comfyui_knows = True
    text_encoders = ("text_encoder",)
    has_lengths = True

    def check(self, transformer: Mapping[str, Any]) -> None:
        if self.max_sequence_length % _MULTIPLE:
            raise ValueError(
                f"Z-Image fills texts up to a multiple of {_MULTIPLE} tokens, and model.max_sequence_length is "
                f"{self.max_sequence_length}; use {min(_filled(self.max_sequence_length), self.longest_text)}"
            )
        # the first position is no text's, and the image stands behind the last
        longest = _positions(transformer)[0] - 2
        if self.max_sequence_length > longest:
            raise ValueError(
                f"model.max_sequence_length is {self.max_sequence_length}, and this transformer has positions for "
                f"{longest // _MULTIPLE * _MULTIPLE} tokens; use model.max_sequence_length="
                f"{longest // _MULTIPLE * _MULTIPLE}"
            )
        patches = zip(transformer.get("all_patch_size", (2,)), transformer.get("all_f_patch_size", (1,)), strict=False)
        if (_PATCH, 1) not in patches:
            raise ValueError("this transformer has no patches of 2 x 2 in one frame; use Tongyi-MAI/Z-Image")
        if transformer.get("siglip_feat_dim") is not None:
            raise ValueError("this transformer reads images too (siglip_feat_dim); use Tongyi-MAI/Z-Image")

    @classmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return _PATCH, min(_positions(transformer)[1:])

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["cap_feat_dim"], 0

    def check_text(self, text: str) -> None:
        refuse_longer(text, len(self._tokens(text)), self.max_sequence_length, self.longest_text)

    def _tokens(self, text: str) -> list[int]:
        tokenizer, messages = self.pipeline.tokenizer, [{"role": "user", "content": text}]
        template = {"add_generation_prompt": True, "enable_thinking": True}
        tokens: list[int] = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, **template)).input_ids
        return tokens

    def call_arguments(self) -> dict[str, Any]:
        # as its authors write guidance
        return super().call_arguments() | {"guidance_scale": self.guidance_scale - 1}

    def run_encoders(self, text: str) -> Conditions:
        self.check_text(text)
        # tokens that fill it up would be behind it, where a causal model does not see them
        ids_1M = torch.tensor([self._tokens(text)])
        output = self.pipeline.text_encoder(input_ids=ids_1M.to(self.device), output_hidden_states=True)
        embeds_1MC = output.hidden_states[-2]
        return Conditions(embeds_1MC, embeds_1MC.new_empty(1, 0))


def _positions(transformer: Mapping[str, Any]) -> Sequence[int]:
    """Of each axis, how many there are."""
    positions: Sequence[int] = transformer.get("axes_lens", (1024, 512, 512))
    return positions
