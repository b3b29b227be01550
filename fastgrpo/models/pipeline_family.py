"""What a family of models writes: its diffusers classes, its network, and how texts and latents become what they are.

Each family is a page beside this one, a subclass of ``PipelineModel``, which does the rest.
Letters: B samples, L text tokens, C H W latent channels, height and width.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from fastgrpo.models.architectures import Architecture
from fastgrpo.models.image_sizes import ImageSizes
from fastgrpo.models.policy import Network, Policy
from fastgrpo.models.weights import pipeline_directory, read_config
from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions


class PipelineFamily(Policy):
    """Over a diffusers pipeline with a transformer, an autoencoder and text encoders."""

    pipeline_class: Any
    transformer_class: Any
    autoencoder_class: Any = AutoencoderKL
    network_class: Callable[..., Network]
    # names of its components: those that encode text, and of these T5 with its tokenizer, which may be left out
    text_encoders: tuple[str, ...]
    t5: tuple[str, ...] = ()
    # whether texts are as long as they are, and what fills them up is left out of attention
    has_lengths = False
    # the least and the most tokens that it was trained with
    shortest_text, longest_text = 1, 512
    # whether a velocity under guidance is linear in its two branches
    guidance_is_linear = True
    # whether an AutoencoderTiny may know its latents: not where they are packed, or those of a video's autoencoder
    has_small_decoders = True
    # whether ComfyUI knows the layers of the transformer by the names that they have here
    comfyui_knows = False

    pipeline: Any
    max_sequence_length: int
    guidance_scale: float

    def check(self, transformer: Mapping[str, Any]) -> None:
        """ValueError for settings that do not go with a transformer of this config."""

    @classmethod
    @abstractmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        """By a transformer's config: latent pixels in a row of one token, and the most tokens in a row, if any."""

    @abstractmethod
    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """By a transformer's config: the width of a token's embedding, and of a whole text's, 0 where there is none."""

    def num_text_tokens(self, text: str) -> int:
        """Of a random condition: about as many as a text has with its template, where texts are as long as they are."""
        return (
            min(16 + 2 * len(text.split()), self.max_sequence_length) if self.has_lengths else self.max_sequence_length
        )

    def call_arguments(self) -> dict[str, Any]:
        """What diffusers' pipeline is called with to draw as this model does, beside prompt, size and times."""
        return {"guidance_scale": self.guidance_scale, "max_sequence_length": self.max_sequence_length}

    def make_network(self, **settings: Any) -> Network:
        return self.network_class(**settings)

    def attention_of(self, name: str) -> str:
        """What ``runtime.attention`` means for this network; ValueError for what it cannot run."""
        if not getattr(self.network_class, "has_own_attention", False):
            return name
        if name not in ("auto", "sdpa"):
            raise ValueError(
                f"runtime.attention={name}: {self.network_class.__name__} runs diffusers' own attention; use "
                "runtime.attention=sdpa"
            )
        return "sdpa"

    def check_text(self, text: str) -> None:
        """ValueError for a text that is too long, told by the tokenizer alone."""

    @abstractmethod
    def run_encoders(self, text: str) -> Conditions:
        """One row, of a text, by ``self.pipeline``; ValueError for one that is too long."""

    @classmethod
    def pixels_of_latent(cls, vae: Mapping[str, Any]) -> int:
        """By an autoencoder's config: pixels in a row of one latent pixel."""
        return 2 ** (len(vae.get("block_out_channels", [0])) - 1)

    def num_channels(self, vae: Mapping[str, Any]) -> int:
        """By an autoencoder's config: channels of a latent."""
        return int(vae["latent_channels"])

    def unscaled(self, x_BCHW: Tensor) -> Tensor:
        """What the autoencoder decodes, of latents as the transformer knows them."""
        config = self.pipeline.vae.config
        if config.get("latents_mean") is not None:
            # of each channel
            std_C11, mean_C11 = (
                on_device(values, x_BCHW.device)[:, None, None] for values in (config.latents_std, config.latents_mean)
            )
            return x_BCHW * std_C11 + mean_C11
        # some autoencoders have no shift
        return x_BCHW / config.scaling_factor + (config.get("shift_factor") or 0.0)

    @staticmethod
    def decoded(vae: Any, z_BCHW: Tensor) -> Tensor:
        """Images [B, 3, height, width] in [-1, 1]."""
        return vae.decode(z_BCHW, return_dict=False)[0]

    @property
    def decoder(self) -> Any:
        """What ``decoded`` is given."""
        return self.pipeline.vae

    def pipeline_of(self, **parts: Any) -> Any:
        """A pipeline of these parts alone."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters.values()
        absent = [one.name for one in parameters if one.default is one.empty and one.name != "self"]
        return self.pipeline_class(**dict.fromkeys(absent) | parts)

    @classmethod
    def image_sizes(
        cls, weights: str, architecture: Architecture | None = None, variant: str | None = None
    ) -> ImageSizes:
        """Which images such a model can draw; no weight is read for it."""
        if (random := architecture_of(weights, architecture)) is not None:
            return cls.image_sizes_of(*cls.random_configs(random))
        directory = pipeline_directory(cls.pipeline_class, weights, variant)
        return cls.image_sizes_of(*(read_config(directory / part / "config.json") for part in ("transformer", "vae")))

    @classmethod
    def image_sizes_of(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> ImageSizes:
        patch, most_tokens = cls.tokens_of(transformer)
        return ImageSizes.of(patch=patch, pixels=cls.pixels_of_latent(vae), most_tokens=most_tokens)

    @classmethod
    def random_configs(cls, random: Architecture) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return random.sizes("transformer", cls.transformer_class), random.sizes("autoencoder", cls.autoencoder_class)


def architecture_of(weights: str, architecture: Architecture | None) -> Architecture | None:
    """The architecture to fill with random weights, or None where weights are loaded."""
    if weights != "random":
        return None
    if architecture is None:
        raise ValueError(
            "model.weights=random needs model.architecture; take a model that has one, as model=sd35_medium"
        )
    return architecture
