"""FLUX.2 klein reads transformers in the layout of their makers, and conditions that it has kept."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.flux2 import Flux2Klein
from tests.tiny import PROMPTS
from tests.tiny_flux2 import make_model, make_pipeline, make_transformer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux2")


def in_the_original_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As github.com/black-forest-labs/flux2 names and joins the weights of a transformer."""
    names = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "proj_out": "final_layer.linear",
        **{
            f"{kind}.linear": f"{kind}.lin" for kind in ("double_stream_modulation_img", "double_stream_modulation_txt")
        },
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    }
    found = {f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in names.items()}
    # shifts come first there
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat(state["norm_out.linear.weight"].chunk(2)[::-1])
    for number in (0, 1):
        ours, theirs = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for side, qkv, out, norm, ff in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added", "ff_context"),
        ):
            joined = torch.cat([state[f"{ours}.attn.{name}.weight"] for name in qkv])
            found[f"{theirs}.{side}_attn.qkv.weight"] = joined
            found[f"{theirs}.{side}_attn.proj.weight"] = state[f"{ours}.attn.{out}.weight"]
            found[f"{theirs}.{side}_attn.norm.query_norm.scale"] = state[f"{ours}.attn.{norm}_q.weight"]
            found[f"{theirs}.{side}_attn.norm.key_norm.scale"] = state[f"{ours}.attn.{norm}_k.weight"]
            found[f"{theirs}.{side}_mlp.0.weight"] = state[f"{ours}.{ff}.linear_in.weight"]
            found[f"{theirs}.{side}_mlp.2.weight"] = state[f"{ours}.{ff}.linear_out.weight"]
        ours, theirs = f"single_{ours}", f"single_blocks.{number}"
        found[f"{theirs}.linear1.weight"] = state[f"{ours}.attn.to_qkv_mlp_proj.weight"]
        found[f"{theirs}.linear2.weight"] = state[f"{ours}.attn.to_out.weight"]
        found[f"{theirs}.norm.query_norm.scale"] = state[f"{ours}.attn.norm_q.weight"]
        found[f"{theirs}.norm.key_norm.scale"] = state[f"{ours}.attn.norm_k.weight"]
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_it_takes_a_file_in_the_original_layout(prefix: str, weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    transformer = make_transformer()
    theirs = in_the_original_layout(transformer.state_dict())
    assert sum(weight.numel() for weight in theirs.values()) == sum(w.numel() for w in transformer.parameters())
    save_file({f"{prefix}{name}": weight.contiguous() for name, weight in theirs.items()}, tmp_path / "x.safetensors")
    model = make_model(weights, transformer=str(tmp_path / "x.safetensors"), adaptation=FullFineTuning())
    assert model.transformer.state_dict().keys() == transformer.state_dict().keys()
    for name, weight in transformer.state_dict().items():
        assert torch.equal(model.transformer.state_dict()[name], weight), name


def test_conditions_are_kept_on_disk(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_model(weights, condition_cache=str(tmp_path)).encode(PROMPTS)
    monkeypatch.setattr(Flux2Klein, "run_encoders", lambda *_: pytest.fail("a text was encoded again"))
    kept = make_model(weights, condition_cache=str(tmp_path)).encode(PROMPTS)
    assert torch.equal(kept.embeds_BLC, made.embeds_BLC)
    assert kept.pooled_BC.shape == made.pooled_BC.shape == (len(PROMPTS), 0)
