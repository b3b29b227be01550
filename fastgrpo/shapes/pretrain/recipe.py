"""The sizes of the embedded model's four trainings and of what the last of them learns from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the trainings; images per second of the first three are about 130, 500 and 300 on two CPU cores."""

    seed: int = 0
    autoencoder_steps: int = 1300
    transformer_cycles: tuple[int, ...] = (3200, 4200)
    scorer_steps: int = 800
    num_scenes: int = 20000
    wrong_captions: float = 0.15
    num_decoded: int = 8192
    estimate_decoder_steps: int = 1500
