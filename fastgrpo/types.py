"""What the stages of an iteration hand on: prompts -> conditions -> noise -> trajectories -> rewards.

Letters, used in names throughout the package:
    P prompts of an iteration, G samples of a prompt (the group)
    B = P * G samples, prompt-major: row b is sample b % G of prompt b // G; on several ranks, those of one rank
    K candidates of a noise search
    T trained steps of a trajectory, N steps of the schedule
    C, H, W channels, height and width of a latent or an image
    L text tokens (C is then the width of an embedding)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.resolution import Resolution

# of a batch, or float32 [B], one a sample
Time = float | Tensor


@dataclass(frozen=True)
class Prompt:
    """A row of a prompt file.  ``resolution`` is that of its images; None is the model's own.

    metadata: what else its row says, as JSON has it: rewards that ask for it are given it, and nobody else reads it.
    negative: the text of the other branch of guidance; None is the empty one.
    """

    text: str
    resolution: Resolution | None = None
    # a mapping has no hash; rows that differ in it alone are different rows
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    negative: str | None = None


def as_prompts(prompts: Iterable[Prompt | str]) -> list[Prompt]:
    """Of texts and rows; a text alone has no metadata."""
    return [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def prompts_of(texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """Of texts and as many metadata, or none."""
    return [Prompt(text, metadata=its) for text, its in zip(texts, metadata or [{}] * len(texts), strict=True)]


@dataclass(frozen=True)
class Prompts:
    """The P prompts of one iteration, whose images are of one ``resolution``; None is the model's own.

    ``asked`` may be given as texts.  ``ids`` count prompt occurrences (iteration * P + p); noise is drawn by them.
    """

    asked: Sequence[Prompt | str]
    ids: list[int]
    resolution: Resolution | None = None

    def __post_init__(self) -> None:
        if len(self.asked) != len(self.ids):
            raise ValueError(f"{len(self.asked)} prompts but {len(self.ids)} ids; give every prompt one id")
        object.__setattr__(self, "asked", as_prompts(self.asked))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in as_prompts(self.asked)]


@dataclass(frozen=True)
class Samples:
    """Samples of an iteration, for example those that one rank makes, by their ``rows`` among its B = P * G.

    ``most`` is how many the rank has that has most.
    """

    prompts: Prompts
    group_size: int
    rows: tuple[int, ...]
    most: int = 0

    @classmethod
    def all_of(cls, prompts: Prompts, group_size: int) -> "Samples":
        """Every sample, prompt by prompt."""
        return cls(prompts, group_size, tuple(range(len(prompts) * group_size)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def asked(self) -> list[Prompt]:
        """The prompt of each sample."""
        of_prompts = as_prompts(self.prompts.asked)
        return [of_prompts[row // self.group_size] for row in self.rows]

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.asked]

    @property
    def prompt_ids(self) -> list[int]:
        return [self.prompts.ids[row // self.group_size] for row in self.rows]

    @property
    def places(self) -> list[int]:
        """The place of each sample in its group."""
        return [row % self.group_size for row in self.rows]


@dataclass(frozen=True)
class Conditions:
    """Encoded text, one row a prompt or a sample.  Rows of equal text have equal ``keys``, where these are known.

    Only the first ``lengths_B`` tokens of a row are its text, the rest fills it up; where nothing fills, all are.  A
    text without a pooled embedding has one of width 0.  ``negative`` are those of the other branch of guidance, row by
    row; None is the empty text in all rows.
    """

    embeds_BLC: Tensor
    pooled_BC: Tensor
    keys: tuple[int, ...] = ()
    lengths_B: Tensor = field(kw_only=True, default=None)  # type: ignore[assignment]
    negative: "Conditions | None" = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        if self.lengths_B is None:
            num_rows, num_tokens = self.embeds_BLC.shape[:2]
            lengths_B = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=self.embeds_BLC.device)
            object.__setattr__(self, "lengths_B", lengths_B)

    def __len__(self) -> int:
        return len(self.embeds_BLC)

    def __getitem__(self, rows: slice) -> "Conditions":
        return Conditions(
            self.embeds_BLC[rows],
            self.pooled_BC[rows],
            self.keys[rows],
            lengths_B=self.lengths_B[rows],
            negative=None if self.negative is None else self.negative[rows],
        )

    def cat(self, *others: "Conditions") -> "Conditions":
        """The rows of all, those with fewer tokens filled up with zeros; ``negative`` where all have it."""
        parts = (self, *others)
        longest = max(part.embeds_BLC.shape[1] for part in parts)
        negatives = [part.negative for part in parts if part.negative is not None]
        return Conditions(
            torch.cat([_filled(part.embeds_BLC, longest) for part in parts]),
            torch.cat([part.pooled_BC for part in parts]),
            tuple(key for part in parts for key in part.keys) if all(part.keys for part in parts) else (),
            lengths_B=torch.cat([part.lengths_B for part in parts]),
            negative=negatives[0].cat(*negatives[1:]) if len(negatives) == len(parts) else None,
        )

    def take(self, rows: Sequence[int]) -> "Conditions":
        """The given rows, in that order.  Slices, not an index tensor: nothing is copied from the host."""
        first, *others = [self[row : row + 1] for row in rows]
        return first.cat(*others)

    def repeat(self, group_size: int) -> "Conditions":
        """Each row ``group_size`` times in a row: conditions of prompts become conditions of samples."""
        return Conditions(
            self.embeds_BLC.repeat_interleave(group_size, dim=0),
            self.pooled_BC.repeat_interleave(group_size, dim=0),
            tuple(key for key in self.keys for _ in range(group_size)),
            lengths_B=self.lengths_B.repeat_interleave(group_size),
            negative=None if self.negative is None else self.negative.repeat(group_size),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditions":
        """A function of each tensor."""
        embeds_BLC, pooled_BC, lengths_B = map(function, (self.embeds_BLC, self.pooled_BC, self.lengths_B))
        negative = None if self.negative is None else self.negative.map(function)
        return Conditions(embeds_BLC, pooled_BC, self.keys, lengths_B=lengths_B, negative=negative)

    def to(self, device: torch.device | str) -> "Conditions":
        return self.map(lambda part: part.to(device))

    @property
    def num_bytes(self) -> int:
        of_negative = 0 if self.negative is None else self.negative.num_bytes
        return self.embeds_BLC.nbytes + self.pooled_BC.nbytes + self.lengths_B.nbytes + of_negative


def _filled(embeds_BLC: Tensor, num_tokens: int) -> Tensor:
    missing = num_tokens - embeds_BLC.shape[1]
    return F.pad(embeds_BLC, (0, 0, 0, missing)) if missing else embeds_BLC


@dataclass(frozen=True)
class Scored:
    """The scores [P, K] of a round of a search's candidates, of the prompts at ``places`` among an iteration's.

    They are estimates, or rewards of images that were made in full.
    """

    places: tuple[int, ...]
    scores_PK: Tensor
    is_of_images: bool = False


@dataclass(frozen=True)
class Noise:
    """The start noises a proposal chose, and what its search measured; the latter is of all samples, on every rank.

    ``estimates_PG`` is the reward that the search estimated for each start noise: None where nothing was scored, NaN
    for a noise that was not.  Its rank correlation with the final rewards tells whether the search is informative.
    ``is_shared`` says that all samples of each prompt start from one noise.  ``learned_P`` says of each prompt whether
    its noises were drawn from a learned distribution; it is empty where none is learned.  ``scored`` has every round of
    the search, for who shows it.
    """

    start_BCHW: Tensor
    metrics: dict[str, float]
    num_scored: int
    estimates_PG: Tensor | None = None
    is_shared: bool = False
    learned_P: tuple[bool, ...] = ()
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class ChosenNoise:
    """The noise of one step that a search chose, and what becomes of the advantage A there: scale_B A + offset_B.

    ``metrics``, ``estimates_PG`` and ``scored`` are what it measured, as in ``Noise``.
    """

    noise_BCHW: Tensor
    scale_B: Tensor
    offset_B: Tensor
    estimates_PG: Tensor | None
    metrics: dict[str, float]
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class TrainedSteps:
    """What update replays: T stochastic steps of B samples.  ``steps`` are their indices into the grid.

    ``unconditional_TBCHW`` is the old policy's other branch of guidance; T is 0 there without guidance.  ``mean_TBCHW``
    is its mean of x_next; T is 0 there unless the objective asks for it.  The advantage A of a step is scale_TB A +
    offset_TB; T is 0 there, and A as it is, unless the noise of a step was chosen.
    """

    steps: tuple[int, ...]
    x_TBCHW: Tensor
    x_next_TBCHW: Tensor
    log_prob_TB: Tensor
    unconditional_TBCHW: Tensor
    mean_TBCHW: Tensor
    scale_TB: Tensor = None  # type: ignore[assignment]
    offset_TB: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("scale_TB", "offset_TB"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.log_prob_TB[:0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored; dimension 1 is samples."""
        latents = (self.x_TBCHW, self.x_next_TBCHW, self.log_prob_TB, self.unconditional_TBCHW, self.mean_TBCHW)
        return *latents, self.scale_TB, self.offset_TB

    def chosen_by(self, chosen: ChosenNoise) -> "TrainedSteps":
        """The same, of which the first step took a noise that was chosen."""
        scale_TB, offset_TB = torch.ones_like(self.log_prob_TB), torch.zeros_like(self.log_prob_TB)
        scale_TB[0], offset_TB[0] = chosen.scale_B, chosen.offset_B
        return replace(self, scale_TB=scale_TB, offset_TB=offset_TB)

    def advantages(self, place: int, advantages_B: Tensor) -> Tensor:
        """Those of one step, of the first samples, of which ``advantages_B`` are known."""
        if len(self.scale_TB) == 0:
            return advantages_B
        first = slice(len(advantages_B))
        return self.scale_TB[place, first] * advantages_B + self.offset_TB[place, first]

    def map(self, function: Callable[[Tensor], Tensor]) -> "TrainedSteps":
        """A function of each tensor."""
        return TrainedSteps(self.steps, *map(function, self.tensors))

    def select(self, select: Callable[[Tensor, int], Tensor]) -> "TrainedSteps":
        """Some of the samples: ``select`` takes them from a tensor along a dimension."""
        return self.map(lambda part_TB: select(part_TB, 1))

    @property
    def by_sample(self) -> list[tuple[Tensor, int]]:
        """Each tensor, and its dimension of samples."""
        return [(tensor, 1) for tensor in self.tensors]

    def cat(self, *others: "TrainedSteps") -> "TrainedSteps":
        """The samples of all, of the same steps."""
        columns = zip(self.tensors, *(other.tensors for other in others), strict=True)
        return TrainedSteps(self.steps, *(torch.cat(column, dim=1) for column in columns))


@dataclass(frozen=True)
class TrainedImages:
    """What update noises again: the final latents of B samples, x_0 in float32, and whose they are."""

    samples: Samples
    x_0_BCHW: Tensor

    @property
    def by_sample(self) -> list[tuple[Tensor, int]]:
        """Each tensor, and its dimension of samples."""
        return [(self.x_0_BCHW, 0)]


@dataclass(frozen=True)
class SampleGradients:
    """What a rollout took of some samples, so that update need not replay them.

    ``log_prob_TB`` is what was differentiated; ``weights`` are, of each trained weight, by each sample, the gradient of
    its sum over trained steps: [B, ...].
    """

    log_prob_TB: Tensor
    weights: list[Tensor]

    def first(self, count: int) -> "SampleGradients":
        """Of the first ``count`` samples."""
        return SampleGradients(self.log_prob_TB[:, :count], [weight_B[:count] for weight_B in self.weights])


# what a rollout leaves to be learned from
Trained = TypeVar("Trained", bound=TrainedSteps | TrainedImages, covariant=True)


@dataclass(frozen=True)
class Trajectories(Generic[Trained]):
    """B images (float32, in [0, 1]) and what is learned from: the trained steps that led to them, or their latents.

    ``gradients``, where the rollout took them, are those of its first samples, in parts.  ``chosen`` is the noise of
    the first trained step, where it was searched.
    """

    images_BCHW: Tensor
    start_BCHW: Tensor
    trained: Trained
    gradients: list[SampleGradients] = field(default_factory=list)
    chosen: ChosenNoise | None = None

    def noted(self, noise: Noise) -> Noise:
        """The start noise with what the search of a step measured, where there was one."""
        if self.chosen is None:
            return noise
        metrics, estimates_PG = noise.metrics | self.chosen.metrics, self.chosen.estimates_PG
        return replace(noise, metrics=metrics, estimates_PG=estimates_PG, scored=self.chosen.scored)

    @property
    def by_sample(self) -> list[tuple[Tensor, int]]:
        """Each tensor, and its dimension of samples; gradients apart."""
        return [(self.images_BCHW, 0), (self.start_BCHW, 0), *self.trained.by_sample]


@dataclass(frozen=True)
class Rewards:
    """Each named reward, their weighted sum, and the sum that advantages are made of: that, or of normalized ones."""

    named: dict[str, Tensor]
    total_PG: Tensor
    learned_PG: Tensor
