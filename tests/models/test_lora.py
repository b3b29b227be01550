"""Adapters change nothing when installed, train alone, leave the reference untouched, and load in diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from fastgrpo.config import load_config
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.types import Conditions
from fastgrpo_kernels import GuidedVelocity, combined

TEXTS = ["a red circle", "two blue squares"]
T = 0.7
# Flow-GRPO's targets; the last block of SD3 has no text stream to write back to
FLOW_GRPO_TARGETS = {
    *(f"0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"0.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"1.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"1.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
}


def make_model(weights: Path, adaptation, **settings) -> StableDiffusion3:
    return StableDiffusion3(
        weights=str(weights), adaptation=adaptation, resolution=64, max_sequence_length=0, use_t5=False, **settings
    )


def load_pipeline(weights: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(weights, text_encoder_3=None, tokenizer_3=None)


@torch.no_grad()
def velocity_of(transformer: SD3Transformer2DModel, x: Tensor, conditions: Conditions) -> Tensor:
    """The velocity by diffusers' own interface."""
    output = transformer(
        hidden_states=x,
        timestep=torch.full((len(x),), 1000 * T),
        encoder_hidden_states=conditions.embeds_BLC,
        pooled_projections=conditions.pooled_BC,
    )
    return output.sample


def make_latents() -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


def train_a_little(model: StableDiffusion3, num_steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=2e-2)
    x, conditions = make_latents(), model.encode(TEXTS)
    for _ in range(num_steps):
        (combined(model.velocity(x, T, conditions)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_new_adapters_change_no_bit(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4))
    x, conditions = make_latents(), model.encode(TEXTS)
    v = combined(model.velocity(x, T, conditions))
    # merged, they add nothing to the weights and are not computed
    with model.sampling():
        assert torch.equal(combined(model.velocity(x, T, conditions)), v)
    base = velocity_of(load_pipeline(tiny_weights).transformer, x, conditions)
    torch.testing.assert_close(v, base, atol=1e-5, rtol=0)


def test_the_targets_are_those_of_flow_grpo(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4))
    names = {name.removeprefix("transformer_blocks.") for name in model.trainable}
    adapters = {f"{target}.lora_{side}.weight" for target in FLOW_GRPO_TARGETS for side in "AB"}
    assert names == adapters
    assert {name for name, p in model.transformer.named_parameters() if p.requires_grad} == {
        name.replace(".weight", "") for name in model.trainable
    }


def test_second_attention_and_feed_forward_are_left_alone_unless_named() -> None:
    feed_forward = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 8)}), nn.GELU(), nn.Linear(8, 4)])
    block = nn.ModuleDict(
        {
            "attn": nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)}),
            "attn2": nn.ModuleDict({"to_q": nn.Linear(4, 4)}),
            "ff": nn.ModuleDict({"net": feed_forward}),
        }
    )
    assert set(LoRA(rank=2)(block).lora_config["target_modules"]) == {"attn.to_q", "attn.to_k"}


def test_named_feed_forwards_are_adapted(tiny_weights: Path) -> None:
    targets = make_model(
        tiny_weights, LoRA(rank=4, targets=tuple(load_config("train", ["adaptation=lora_flux"]).adaptation.targets))
    ).adaptation.lora_config
    names = {name.removeprefix("transformer_blocks.") for name in targets["target_modules"]}
    both_streams = {"0.ff.net.0.proj", "0.ff.net.2", "0.ff_context.net.0.proj", "0.ff_context.net.2"}
    assert names == FLOW_GRPO_TARGETS | both_streams | {"1.ff.net.0.proj", "1.ff.net.2"}


def test_adapters_start_as_flow_grpo_starts_them() -> None:
    layer = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(4000, 10)})})
    trainable = LoRA(rank=8)(layer).trainable
    assert trainable["attn.to_q.lora_A.weight"].std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not trainable["attn.to_q.lora_B.weight"].any()


def test_the_reference_is_the_untouched_base_after_training(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4))
    x, conditions = make_latents(), model.encode(TEXTS)
    before = combined(model.velocity(x, T, conditions)).detach()
    train_a_little(model)
    assert torch.equal(combined(model.velocity_and_reference(x, T, conditions)[1]), before)
    assert (combined(model.velocity(x, T, conditions)) - before).abs().max() > 1e-2
    own = {name.replace(".base.", "."): weight for name, weight in model.transformer.state_dict().items()}
    base = load_pipeline(tiny_weights).transformer.state_dict()
    assert [name for name, weight in base.items() if not torch.equal(own[name], weight)] == []


@pytest.mark.parametrize("backup", ["device", "host"])
def test_merged_for_sampling_the_velocity_is_the_same_and_every_bit_comes_back(backup: str, tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4, alpha=6.0, backup=backup))
    x, conditions = make_latents(), model.encode(TEXTS)
    for _ in range(2):
        train_a_little(model)
        before = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
        unmerged = combined(model.velocity(x, T, conditions)).detach()
        with model.sampling(), model.sampling(lossy=True):
            merged = combined(model.velocity(x, T, conditions))
            changed = [
                name for name, weight in model.transformer.state_dict().items() if not torch.equal(weight, before[name])
            ]
        torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=0)
        trained = {name.split(".lora_B")[0] for name, b in model.trainable.items() if "lora_B" in name and b.any()}
        assert {name.removesuffix(".base.weight") for name in changed} == trained
        assert len(trained) >= 14
        assert all(torch.equal(weight, before[name]) for name, weight in model.transformer.state_dict().items())
        assert torch.equal(combined(model.velocity(x, T, conditions)), unmerged)


def test_merged_weights_are_rounded_once_to_the_type_of_the_base(tiny_weights: Path) -> None:
    model = StableDiffusion3(
        weights=str(tiny_weights), adaptation=LoRA(rank=4), resolution=64, max_sequence_length=0, use_t5=False,
        dtype="bfloat16",
    )  # fmt: skip
    train_a_little(model)
    layer = model.transformer.transformer_blocks[0].attn.to_q
    before = layer.base.weight.clone()
    exact = before.double() + layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    with model.sampling():
        # float32 sums round before bfloat16 does, which a tie can show
        torch.testing.assert_close(layer.base.weight.double(), exact, rtol=2**-8, atol=1e-9)
        assert (layer.base.weight == exact.bfloat16()).float().mean() > 0.999
    assert torch.equal(layer.base.weight, before)


def test_merging_ends_also_where_sampling_fails(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4))
    train_a_little(model)
    before = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the middle"), model.sampling():
        raise RuntimeError("in the middle")
    assert all(torch.equal(weight, before[name]) for name, weight in model.transformer.state_dict().items())
    assert combined(model.velocity(make_latents(), T, model.encode(TEXTS))).requires_grad


def test_policy_and_reference_in_one_batch_are_those_of_two(tiny_weights: Path) -> None:
    model = StableDiffusion3(
        weights=str(tiny_weights), adaptation=LoRA(rank=4), resolution=64, max_sequence_length=0, use_t5=False,
        guidance_scale=3.0,
    )  # fmt: skip
    x, conditions = make_latents(), model.encode(TEXTS)
    start = model.velocity(x, T, conditions).detach()
    train_a_little(model)
    policy = model.velocity(x, T, conditions).detach()
    assert isinstance(start, GuidedVelocity)
    assert isinstance(policy, GuidedVelocity)
    known = policy.unconditional
    for unconditional in (None, known):
        v, reference = model.velocity_and_reference(x, T, conditions, unconditional)
        assert isinstance(v, GuidedVelocity)
        assert isinstance(reference, GuidedVelocity)
        assert torch.equal(v.conditional, policy.conditional)
        torch.testing.assert_close(v.unconditional, known, atol=1e-5, rtol=0)
        torch.testing.assert_close(reference.conditional, start.conditional, atol=1e-5, rtol=0)
        torch.testing.assert_close(reference.unconditional, start.unconditional, atol=1e-5, rtol=0)
        assert v.conditional.requires_grad
        assert not reference.conditional.requires_grad
    assert (policy.unconditional - start.unconditional).abs().max() > 1e-3


def test_saved_adapters_give_the_same_velocity_in_diffusers(tiny_weights: Path, tmp_path: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4, alpha=6.0))
    train_a_little(model)
    model.save_lora(tmp_path)
    pipeline = load_pipeline(tiny_weights)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    x, conditions = make_latents(), model.encode(TEXTS)
    theirs = velocity_of(pipeline.transformer, x, conditions)
    torch.testing.assert_close(combined(model.velocity(x, T, conditions)).detach(), theirs, atol=1e-5, rtol=0)


def test_a_merged_pipeline_gives_the_same_velocity(tiny_weights: Path, tmp_path: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4, alpha=6.0))
    train_a_little(model)
    x, conditions = make_latents(), model.encode(TEXTS)
    trained = combined(model.velocity(x, T, conditions)).detach()
    model.save_merged(tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())
    torch.testing.assert_close(velocity_of(pipeline.transformer, x, conditions), trained, atol=1e-5, rtol=0)


def test_full_fine_tuning_trains_every_weight_and_its_reference_stays_the_start(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, FullFineTuning())
    x, conditions = make_latents(), model.encode(TEXTS)
    before = combined(model.velocity(x, T, conditions)).detach()
    weights = {name: weight.detach().clone() for name, weight in model.transformer.named_parameters()}
    assert model.trainable.keys() == weights.keys()
    train_a_little(model)
    assert [name for name, weight in model.trainable.items() if torch.equal(weight, weights[name])] == []
    assert torch.equal(combined(model.velocity_and_reference(x, T, conditions)[1]), before)
    assert (combined(model.velocity(x, T, conditions)) - before).abs().max() > 1e-2


def test_full_fine_tuning_has_no_adapters_to_write(tiny_weights: Path, tmp_path: Path) -> None:
    model = make_model(tiny_weights, FullFineTuning())
    assert not model.has_lora
    with pytest.raises(ValueError, match="full fine-tuning has no LoRA to write; export the merged pipeline"):
        model.save_lora(tmp_path)


def test_without_a_kept_reference_there_is_none(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, FullFineTuning(keep_reference=False))
    with pytest.raises(ValueError, match=r"kl_coef > 0 needs the reference policy; .*keep_reference=true"):
        model.velocity_and_reference(make_latents(), T, model.encode(TEXTS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"adaptation\.rank must be at least 1, got 0; use adaptation=full"),
        ({"alpha": 0.0}, r"adaptation\.alpha must be positive and finite, got 0\.0"),
        ({"alpha": float("nan")}, r"adaptation\.alpha must be positive and finite, got nan"),
        ({"targets": "to_q"}, r"adaptation\.targets is a list of layers, as in \[to_q,to_k\], got 'to_q'"),
        ({"targets": ()}, r"adaptation\.targets is a list of layers, as in \[to_q,to_k\], got \(\)"),
        ({"targets": ("to_qkv",)}, r"adaptation\.targets: LoRA found no linear layer named to_qkv"),
        ({"backup": "disk"}, r"adaptation\.backup must be device or host, got 'disk'"),
    ],
)
def test_wrong_adapters_are_refused(settings: dict, message: str, tiny_weights: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tiny_weights, LoRA(**settings))


def test_rollout_and_update_compute_the_trained_branch_alike_and_sampling_without_gradient(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4))
    network, modes = model._network, []

    def watched(*inputs: object) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return network(*inputs)  # type: ignore[arg-type]

    watched.modulations, watched.forward = network.modulations, network.forward  # type: ignore[attr-defined]
    model._network = watched  # type: ignore[assignment]
    x, conditions = make_latents(), model.encode(TEXTS)
    with torch.no_grad():
        assert not combined(model.velocity(x, T, conditions)).requires_grad
    assert combined(model.velocity(x, T, conditions)).requires_grad
    assert modes == [True, True]
    with torch.no_grad(), model.sampling():
        forward, seen = model._sampled, []
        model._sampled = [lambda *inputs: seen.append(torch.is_grad_enabled()) or forward[0](*inputs)]  # type: ignore[func-returns-value]
        model.velocity(x, T, conditions)
    assert seen == [False]


def test_a_model_stacks_what_its_network_says(tiny_weights: Path) -> None:
    attn = make_model(tiny_weights, LoRA(rank=4)).transformer.transformer_blocks[0].attn
    assert attn.to_q.stack is attn.to_k.stack is attn.to_v.stack
    assert attn.add_q_proj.stack is attn.add_v_proj.stack is not attn.to_q.stack
