"""A transformer in place of the pipeline's: in each layout the same weights, and one line for what cannot take it."""

import json
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageTransformer2DModel,
)
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.files import hub
from fastgrpo.models.flux import Flux
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.models.transformer_weights import TransformerFile
from tests import tiny_flux
from tests.tiny import make_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
State = dict[str, Tensor]


def load_model(weights: Path, transformer: str | Path | None, **settings: Any) -> StableDiffusion3:
    defaults: dict[str, Any] = {"adaptation": LoRA(rank=2), "resolution": 32, "use_t5": False}
    path = None if transformer is None else str(transformer)
    return StableDiffusion3(weights=str(weights), transformer=path, **defaults | settings)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with other weights than the tiny ones."""
    return make_pipeline(tmp_path_factory.mktemp("other") / "pipeline", seed=1)


@pytest.fixture
def state(other: Path) -> State:
    return load_file(other / WEIGHTS)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))


def written(state: State, path: Path) -> Path:
    save_file({name: weight.contiguous() for name, weight in state.items()}, path)
    return path


def halves_swapped(weight: Tensor) -> Tensor:
    # diffusers has scale before shift in the last modulations, the original has them the other way
    first, second = weight.chunk(2)
    return torch.cat([second, first])


def original(state: State, num_layers: int = 2) -> State:
    """SD3's weights in the layout of github.com/Stability-AI/sd3.5, by hand."""
    renamed = {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj.weight": "pos_embed.proj.weight",
        "x_embedder.proj.bias": "pos_embed.proj.bias",
        "final_layer.linear.weight": "proj_out.weight",
        "final_layer.linear.bias": "proj_out.bias",
        "context_embedder.weight": "context_embedder.weight",
        "context_embedder.bias": "context_embedder.bias",
    }
    for theirs, ours in (("t", "timestep"), ("y", "text")):
        for i, kind in ((0, "weight"), (0, "bias"), (2, "weight"), (2, "bias")):
            renamed[f"{theirs}_embedder.mlp.{i}.{kind}"] = f"time_text_embed.{ours}_embedder.linear_{i // 2 + 1}.{kind}"
    made = {theirs: state[ours] for theirs, ours in renamed.items()}
    for kind in ("weight", "bias"):
        made[f"final_layer.adaLN_modulation.1.{kind}"] = halves_swapped(state[f"norm_out.linear.{kind}"])
    for i in range(num_layers):
        is_last = i == num_layers - 1
        ours = f"transformer_blocks.{i}"
        for side, names in (
            ("x", ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0", "norm1", "ff")),
            (
                "context",
                (
                    *("add_q_proj", "add_k_proj", "add_v_proj"),
                    *("norm_added_q", "norm_added_k", "to_add_out", "norm1_context", "ff_context"),
                ),
            ),
        ):
            q, k, v, norm_q, norm_k, out, norm, ff = names
            block = f"joint_blocks.{i}.{side}_block"
            made[f"{block}.attn.ln_q.weight"] = state[f"{ours}.attn.{norm_q}.weight"]
            made[f"{block}.attn.ln_k.weight"] = state[f"{ours}.attn.{norm_k}.weight"]
            for kind in ("weight", "bias"):
                made[f"{block}.attn.qkv.{kind}"] = torch.cat([state[f"{ours}.attn.{n}.{kind}"] for n in (q, k, v)])
                modulation = state[f"{ours}.{norm}.linear.{kind}"]
                is_short = side == "context" and is_last
                made[f"{block}.adaLN_modulation.1.{kind}"] = halves_swapped(modulation) if is_short else modulation
                if not is_short:
                    made[f"{block}.attn.proj.{kind}"] = state[f"{ours}.attn.{out}.{kind}"]
                    made[f"{block}.mlp.fc1.{kind}"] = state[f"{ours}.{ff}.net.0.proj.{kind}"]
                    made[f"{block}.mlp.fc2.{kind}"] = state[f"{ours}.{ff}.net.2.{kind}"]
    return made


def all_in_one(state: State) -> State:
    """As ComfyUI hands a checkpoint on: with the prefix, and text encoders and autoencoder beside it."""
    inside = {f"model.diffusion_model.{name}": weight for name, weight in original(state).items()}
    return inside | {"first_stage_model.decoder.conv_in.bias": torch.ones(3), "text_encoders.clip_l.x": torch.ones(2)}


LAYOUTS = pytest.mark.parametrize("layout", [dict, original, all_in_one])


def frozen(model: StableDiffusion3) -> State:
    """The weights of its transformer without the adapters, under the names of diffusers."""
    state = model.transformer.state_dict()
    return {name.replace(".base_layer", ""): weight for name, weight in state.items() if "lora" not in name}


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_a_file_are_those_it_was_made_of_and_the_rest_is_the_pipelines(
    layout: Callable[[State], State], dtype: str, tiny_weights: Path, other: Path, state: State, tmp_path: Path
) -> None:
    model = load_model(tiny_weights, written(layout(state), tmp_path / "tuned.safetensors"), dtype=dtype)
    whole, base = load_model(other, None, dtype=dtype), load_model(tiny_weights, None, dtype=dtype)
    expected = frozen(whole)
    assert frozen(model).keys() == expected.keys()
    for name, weight in frozen(model).items():
        assert torch.equal(weight, expected[name]), name
        assert weight.dtype == expected[name].dtype
    assert model.fingerprint == whole.fingerprint != base.fingerprint
    assert torch.equal(model.encode(["a red circle"]).embeds_BLC, base.encode(["a red circle"]).embeds_BLC)
    x_BCHW = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(x_BCHW), base.decode(x_BCHW))
    assert not torch.equal(whole.decode(x_BCHW), base.decode(x_BCHW))


@pytest.mark.parametrize("where", ["", "transformer"], ids=["pipeline", "transformer"])
def test_a_directory_may_hold_a_pipeline_or_a_transformer(
    where: str, tiny_weights: Path, other: Path, tmp_path: Path
) -> None:
    expected = load_model(other, None)
    model = load_model(tiny_weights, other / where)
    assert model.fingerprint == expected.fingerprint
    # weights and sizes of the pipeline's own are not wanted then
    lean = shutil.copytree(tiny_weights, tmp_path / "lean")
    shutil.rmtree(lean / "transformer")
    assert load_model(lean, other / where).fingerprint == expected.fingerprint


def test_a_transformer_in_a_directory_has_its_own_number_of_blocks(tiny_weights: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_weights / "transformer" / "config.json").read_text())
    SD3Transformer2DModel.from_config(config | {"num_layers": 3}).save_pretrained(tmp_path / "three")
    assert len(load_model(tiny_weights, tmp_path / "three").transformer.transformer_blocks) == 3


def test_a_directory_is_read_by_the_variant_as_a_pipeline_is(tiny_weights: Path, other: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_weights, tmp_path / "base")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    transformer = shutil.copytree(tiny_weights / "transformer", tmp_path / "transformer")
    plain = load_model(base, transformer, variant="fp16").fingerprint
    shutil.copy(other / WEIGHTS, transformer / "diffusion_pytorch_model.fp16.safetensors")
    variant = load_model(base, transformer, variant="fp16").fingerprint
    assert (plain, variant) == (load_model(tiny_weights, None).fingerprint, load_model(other, None).fingerprint)
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model\*\.safetensors; set model\.variant to fp16"):
        load_model(tiny_weights, transformer)


def test_a_transformer_is_found_on_the_hub(tiny_weights: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert "transformer/diffusion_pytorch_model-?????-of-?????.safetensors" in allow_patterns
        return str(other)

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = load_model(tiny_weights, "owner/name@v1")
    assert asked == [("owner/name", "v1")]
    assert model.fingerprint == load_model(other, None).fingerprint


def test_a_gated_transformer_says_what_to_do(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise GatedRepoError.__new__(GatedRepoError, "refused")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(
        ValueError, match=r"model\.transformer=owner/name is for who has accepted its licence: do so at"
    ):
        load_model(tiny_weights, "owner/name")


def test_the_merged_pipeline_has_the_weights_of_the_file(
    tiny_weights: Path, other: Path, state: State, tmp_path: Path
) -> None:
    model = load_model(tiny_weights, written(original(state), tmp_path / "tuned.safetensors"))
    model.save_merged(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert merged.keys() == state.keys()
    # fresh adapters add nothing
    assert all(torch.equal(merged[name], weight) for name, weight in state.items())
    encoder = "text_encoder/model.safetensors"
    assert (tmp_path / "merged" / encoder).read_bytes() == (tiny_weights / encoder).read_bytes()


# what is refused


def without(name: str) -> Callable[[State], State]:
    return lambda state: {other: weight for other, weight in state.items() if other != name}


def also(name: str, layout: Callable[[State], State] = dict) -> Callable[[State], State]:
    return lambda state: layout(state) | {name: torch.ones(2)}


def only(*names: str) -> Callable[[State], State]:
    return lambda state: {name: torch.ones(2) for name in names}


def flux(state: State) -> State:
    return dict(tiny_flux.make_transformer().state_dict())


def narrow(state: State) -> State:
    return state | {"proj_out.weight": state["proj_out.weight"][:32]}


def narrow_original(state: State) -> State:
    return original(narrow(state))


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (flux, "is of a FluxTransformer2DModel, not of a SD3Transformer2DModel; take model=flux_dev for it"),
        (
            only("double_blocks.0.img_mod.lin.weight"),
            "is of a FluxTransformer2DModel, not of a SD3Transformer2DModel; take model=flux_dev for it",
        ),
        (
            only("model.diffusion_model.cap_pad_token"),
            "is of a ZImageTransformer2DModel, not of a SD3Transformer2DModel; take model=z_image for it",
        ),
        (only("text_model.a", "text_model.b"), "holds no SD3Transformer2DModel, but text_model.a, text_model.b; give"),
        (only("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), "is a LoRA, and not the weights of a SD3"),
        (
            only("lora_unet_joint_blocks_0.lora_down.weight"),
            "is a LoRA, and not the weights of a SD3Transformer2DModel",
        ),
        (without("pos_embed.pos_embed"), "lacks pos_embed.pos_embed; it must hold all weights of a SD3Transformer2DM"),
        (without("proj_out.bias"), "lacks proj_out.bias; it must hold all weights of a SD3Transformer2DModel of"),
        (
            lambda state: without("final_layer.linear.bias")(original(state)),
            "lacks or misnames 'final_layer.linear.bia",
        ),
        (lambda state: original(state, 1), "lacks transformer_blocks.0.attn.to_add_out"),
        (also("scaled_fp8"), "has scaled_fp8 as well, which that model has not; it must hold"),
        (also("scaled_fp8", original), "has scaled_fp8 as well, which that model has not; it must hold"),
        (narrow, "has proj_out.weight with the shape [32, 32] and not [64, 32]; it must hold all weights of"),
        (narrow_original, "has proj_out.weight with the shape [32, 32] and not [64, 32]; it must hold all weights of"),
    ],
)
def test_a_file_of_something_else_is_refused_before_weights_are_read(
    contents: Callable[[State], State],
    says: str,
    tiny_weights: Path,
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StableDiffusion3, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    path = written(contents(state), tmp_path / "tuned.safetensors")
    with pytest.raises(ValueError, match=r"model\.transformer: ") as raised:
        load_model(tiny_weights, path)
    assert f"model.transformer: {path} {says}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_file_that_is_cut_short_is_damaged(tiny_weights: Path, state: State, tmp_path: Path) -> None:
    path = written(state, tmp_path / "tuned.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"model\.transformer: .*tuned\.safetensors, \d+ bytes, is damaged or cut short"
    ):
        load_model(tiny_weights, path)


@pytest.mark.parametrize(
    ("transformer", "says"),
    [
        ("/nowhere", "='/nowhere' is neither a file nor a directory here (/nowhere) nor the id of a model on the hub"),
        ("", "='' is neither a file nor a directory here"),
        # not an id of the hub
        ("models/a.safetensors", "=models/a.safetensors is not here ({cwd}/models/a.safetensors); give a .safetensors"),
        ("a.ckpt", "=a.ckpt is not a .safetensors file; give a .safetensors file or a directory that exists"),
        ("empty", ": empty/config.json is missing; give a directory that save_pretrained wrote"),
    ],
)
def test_what_is_not_there_says_where_it_was_looked_for(
    transformer: str, says: str, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model\.transformer") as raised:
        load_model(tiny_weights, transformer)
    assert str(raised.value).startswith(f"model.transformer{says.format(cwd=tmp_path)}")


def change_config(**values: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return change


def drop_a_weight(path: Path) -> None:
    path /= "diffusion_pytorch_model.safetensors"
    save_file(without("proj_out.bias")(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            change_config(_class_name="FluxTransformer2DModel"),
            "is of a FluxTransformer2DModel, not of a SD3Transformer2",
        ),
        (
            change_config(joint_attention_dim=64),
            "has joint_attention_dim=64, and {base} has 32; give the model that it",
        ),
        (change_config(num_layers=3), "has transformer_blocks.1.norm1_context.linear.weight with the shape"),
        (drop_a_weight, "lacks proj_out.bias; give the weights of a whole model"),
        (
            lambda path: (path / "diffusion_pytorch_model.safetensors").unlink(),
            "has no diffusion_pytorch_model*.safetensors; give a directory that has them",
        ),
    ],
)
def test_a_directory_that_does_not_fit_is_refused_before_weights_are_read(
    damage: Callable[[Path], Any], says: str, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion3, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    directory = shutil.copytree(tiny_weights / "transformer", tmp_path / "transformer")
    damage(directory)
    with pytest.raises(ValueError, match=r"model\.transformer: ") as raised:
        load_model(tiny_weights, directory)
    assert says.format(base=tiny_weights) in str(raised.value)
    assert str(directory) in str(raised.value)


def test_a_file_is_no_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion3Pipeline, "download", lambda *_, **__: pytest.fail("asked the hub"))
    path = tmp_path / "all.safetensors"
    for name in (str(path), "models/all.safetensors"):
        with pytest.raises(ValueError, match="is one file, and a pipeline has text encoders") as raised:
            load_model(Path(name), None)
        assert f"as model.weights, and model.transformer={name}" in str(raised.value)
        path.touch()


# other families, of which the file alone is looked at


def save(module: Any, directory: Path) -> tuple[Path, State]:
    """A directory with the module in it as a pipeline's transformer, with random weights, and these."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(weight.shape, generator=generator) for name, weight in module.state_dict().items()}
    module.load_state_dict(state)
    module.save_pretrained(directory / "transformer")
    return directory, state


def check_load(path: Path, transformer_class: Any, base: Path) -> None:
    """It is the transformer in ``base``, which diffusers reads from there."""
    file = TransformerFile(path, transformer_class, base)
    file.check()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = file.load(dtype)
        expected = transformer_class.from_pretrained(base, subfolder="transformer", torch_dtype=dtype)
        # what is computed and not stored is in named_buffers alone
        pairs = [(dict(kind(loaded)), dict(kind(expected))) for kind in (named_weights, named_buffers)]
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype
                assert torch.equal(ours[name], tensor)
    assert torch.get_default_dtype() == torch.float32


def named_weights(module: torch.nn.Module) -> State:
    return module.state_dict()


def named_buffers(module: torch.nn.Module) -> State:
    return dict(module.named_buffers())


def test_z_image_is_read_from_the_original_layout(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    module = ZImageTransformer2DModel(**settings, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[8, 8, 8])
    base, state = save(module, tmp_path)
    theirs: State = {}
    for name, weight in state.items():
        if ".attention.to_q." in name:
            qkv = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            theirs[name.replace("to_q", "qkv")] = torch.cat(qkv)
        elif not any(part in name for part in (".attention.to_k.", ".attention.to_v.")):
            short = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
            short = short.replace(".attention.to_out.0.", ".attention.out.")
            theirs[short.replace(".norm_q", ".q_norm").replace(".norm_k", ".k_norm")] = weight
    assert theirs.keys() != state.keys()
    for name, contents in (("theirs", theirs), ("ours", state)):
        path = written(contents, tmp_path / f"{name}.safetensors")
        check_load(path, ZImageTransformer2DModel, base)
    path = written(without("cap_pad_token")(state), tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="lacks cap_pad_token"):
        TransformerFile(path, ZImageTransformer2DModel, base).check()


def test_qwen_image_is_read_with_the_prefix(tmp_path: Path) -> None:
    module = QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    )
    base, state = save(module, tmp_path)
    theirs = {f"model.diffusion_model.{name}": weight for name, weight in state.items()}
    path = written(theirs, tmp_path / "tuned.safetensors")
    check_load(path, QwenImageTransformer2DModel, base)


def test_qwen_image_21_keeps_what_is_computed_as_exact_as_it_is(tmp_path: Path) -> None:
    module = QwenImage21Transformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=16, axes_dims_rope=(4, 6, 6)
    )
    base, state = save(module, tmp_path)
    assert "time_text_embed.time_proj.freqs" in dict(module.named_buffers()).keys() - state.keys()
    check_load(written(state, tmp_path / "tuned.safetensors"), QwenImage21Transformer2DModel, base)


def test_flux_takes_a_file_in_the_layout_of_diffusers(tmp_path: Path) -> None:
    base, other = (tiny_flux.make_pipeline(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    path = written(load_file(other / WEIGHTS), tmp_path / "tuned.safetensors")
    settings: dict[str, Any] = {"adaptation": LoRA(rank=2, targets=("to_q",)), "resolution": 64}
    expected = Flux(weights=str(other), **settings).fingerprint
    assert Flux(weights=str(base), transformer=str(path), **settings).fingerprint == expected
    assert Flux(weights=str(base), **settings).fingerprint != expected


def flux_original() -> dict[str, list[int]]:
    """Names and shapes of FLUX.1-dev in github.com/black-forest-labs/flux, with one block of each kind."""
    width, shapes = 3072, {}
    for name, rows, columns in (
        ("img_in", width, 64),
        ("txt_in", width, 4096),
        ("time_in.in_layer", width, 256),
        ("time_in.out_layer", width, width),
        ("vector_in.in_layer", width, 768),
        ("vector_in.out_layer", width, width),
        ("guidance_in.in_layer", width, 256),
        ("guidance_in.out_layer", width, width),
        ("final_layer.linear", 64, width),
        ("final_layer.adaLN_modulation.1", 2 * width, width),
        *((f"double_blocks.0.{side}_mod.lin", 6 * width, width) for side in ("img", "txt")),
        *((f"double_blocks.0.{side}_attn.qkv", 3 * width, width) for side in ("img", "txt")),
        *((f"double_blocks.0.{side}_attn.proj", width, width) for side in ("img", "txt")),
        *((f"double_blocks.0.{side}_mlp.0", 4 * width, width) for side in ("img", "txt")),
        *((f"double_blocks.0.{side}_mlp.2", width, 4 * width) for side in ("img", "txt")),
        ("single_blocks.0.modulation.lin", 3 * width, width),
        ("single_blocks.0.linear1", 7 * width, width),
        ("single_blocks.0.linear2", width, 5 * width),
    ):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [rows, columns], [rows]
    for side in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for kind in ("query", "key"):
            shapes[f"{side}.norm.{kind}_norm.scale"] = [128]
    return shapes


def write_hollow(shapes: dict[str, list[int]], path: Path) -> None:
    """A file of a byte a number that takes no room: its numbers are a hole."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def test_flux_fits_in_its_real_width(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    module.save_config(tmp_path / "transformer")
    file = TransformerFile(tmp_path / "flux.safetensors", FluxTransformer2DModel, tmp_path)
    write_hollow(flux_original(), file.path)
    file.check()
    write_hollow({name: shape for name, shape in flux_original().items() if "guidance" not in name}, file.path)
    with pytest.raises(ValueError, match=r"lacks time_text_embed\.guidance_embedder\.linear_1\.bias, .* and 1 more"):
        file.check()
