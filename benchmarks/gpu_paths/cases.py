"""The cases: what a config can ask of a GPU, each in the smallest run that takes the path.

All but the last few are of the embedded model or a miniature, and take seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

RECIPES = (
    "flow_grpo", "flow_grpo_fast", "mix_grpo", "dance_grpo", "smart_grpo", "smart_grpo_paper",
    "smart_grpo_paper_step", "chunk_grpo", "flow_dppo", "flow_grpo_guard", "nft", "awm", "v_grpo", "rwr",
)  # fmt: skip
# a family of models each
MINIATURES = (
    "sd35_miniature", "flux_miniature", "z_image_miniature", "qwen_image_miniature", "qwen_image_21_miniature",
    "flux2_klein_miniature",
)  # fmt: skip
_OF_STEPS, _OF_IMAGES = "algorithm=flow_grpo_fast", "algorithm=nft"
# the embedded model's own types are float32, which fp8 and most attention does not take
_HALF = ("model.dtype=bfloat16", "model.decode_dtype=bfloat16")
_MINIATURE = ("train.iterations=1", "reward=jpeg_compressibility", *_HALF)
_RANDOM = "benchmarks.gpu_paths.random_rewards"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Runs of ``fastgrpo train`` one after the other, by what each overrides, in one run directory.

    ranks: processes, each with a GPU of its own.  package: what has to be installed.  is_large: takes minutes, and tens
    of gigabytes.
    """

    name: str
    runs: tuple[tuple[str, ...], ...]
    ranks: int = 1
    package: str = ""
    is_large: bool = False

    def why_not(self, num_gpus: int) -> str:
        """What this machine lacks for it; empty if nothing."""
        if num_gpus < self.ranks:
            return f"needs {self.ranks} GPUs"
        return f"needs {self.package}" if self.package and find_spec(self.package) is None else ""


def all_cases() -> dict[str, Case]:
    """By name."""
    cases = {case.name: case for case in _cases()}
    assert len(cases) == sum(1 for _ in _cases()), "two cases have one name"
    return cases


def _cases() -> Iterator[Case]:
    for recipe in RECIPES:
        for how in ("eager", "blocks", "graphs"):
            yield _case(f"{recipe}-{how}", f"algorithm={recipe}", f"compile={how}")
    yield from _algorithms()
    yield from _runtimes()
    yield from _rewards()
    yield from _ranks()
    yield from _models()


def _algorithms() -> Iterator[Case]:
    for recipe in (_OF_STEPS, _OF_IMAGES):
        short = recipe.partition("=")[2]
        yield _case(f"{short}-kl", recipe, "algorithm.objective.kl_coef=0.01")
        yield _case(f"{short}-optimizer_steps", recipe, "train.optimizer_steps=2", "train.updates=2")
        yield _case(f"{short}-adams_bashforth", recipe, "solver=adams_bashforth")
        yield _case(f"{short}-full", recipe, "adaptation=full")
        yield _case(f"{short}-learned", recipe, "algorithm/noise=learned")
        retried = ("algorithm/noise=retries", "algorithm.noise.where=everywhere", "algorithm.noise.candidates=2")
        yield _case(f"{short}-retries", recipe, *retried, "compile=blocks")
    yield _case("elite_step", _OF_STEPS, "algorithm/noise=elite_step")
    guided = ("model.guidance_scale=2.0",)
    for how in ("eager", "blocks", "graphs"):
        yield _case(f"guidance-kl-{how}", _OF_STEPS, "algorithm.objective.kl_coef=0.01", *guided, f"compile={how}")
    yield _case("cached_guidance", _OF_STEPS, "solver=cached_guidance", *guided)
    for how in ("eager", "blocks", "graphs"):
        yield _case(f"reweight-{how}", _OF_STEPS, "train.gradients=reweight", f"compile={how}")
    yield _case("reweight-guidance", _OF_STEPS, "train.gradients=reweight", "train.optimizer_steps=2", *guided)
    yield _case("lagging_old_policy", _OF_IMAGES, "train.old_policy_growth=0.1")
    yield _case("max_drift", _OF_IMAGES, "train.max_drift=1e-3")


def _runtimes() -> Iterator[Case]:
    for recipe in (_OF_STEPS, _OF_IMAGES):
        short = recipe.partition("=")[2]
        yield _case(f"{short}-bfloat16", recipe, *_HALF)
        yield _case(f"{short}-planned", recipe, "runtime.micro_batch=0")
        yield _case(f"{short}-checkpointing", recipe, "runtime.checkpointing=true")
        yield _case(f"{short}-deterministic", recipe, "runtime.deterministic=true", *_HALF)
        yield _case(f"{short}-profile", recipe, "runtime.profile=true", runs=(("train.iterations=6",),))
        yield _case(f"{short}-resume", recipe, runs=(("checkpoint.every=1",), ("train.iterations=3", "resume=true")))
        for how in ("blocks", "graphs"):
            yield _case(f"{short}-fp8-{how}", recipe, "lossy=fp8", f"compile={how}", *_HALF)
    for name, package in (
        ("sdpa", ""),
        ("cudnn", ""),
        ("flash", "flash_attn"),
        ("flash3", "flash_attn_interface"),
        ("xformers", "xformers"),
    ):
        for how in ("eager", "blocks"):
            attention = (f"runtime.attention={name}", f"compile={how}")
            yield _case(f"attention-{name}-{how}", _OF_STEPS, *attention, *_HALF, package=package)


def _rewards() -> Iterator[Case]:
    embedded = ("reward=clip_score", "reward.terms.clip_score.path=shapes")
    for backend, package in (("eager", ""), ("inductor", ""), ("tensorrt", "torch_tensorrt")):
        yield _case(f"clip_score-{backend}", _OF_STEPS, *embedded, f"reward_backend={backend}", package=package)
    yield _case("searched-clip_score", "algorithm=smart_grpo_paper", *embedded)
    yield _case("jpeg", _OF_STEPS, "reward=jpeg_compressibility")
    for name, package in (
        ("PickScoreEager", ""),
        ("PickScoreInductor", ""),
        ("PickScoreTensorRT", "torch_tensorrt"),
        ("HpsInductor", ""),
        ("AestheticInductor", ""),
        ("ImageRewardInductor", ""),
    ):
        yield _case(name, _OF_STEPS, "reward=custom", f"reward.path={_RANDOM}.{name}", package=package)


def _ranks() -> Iterator[Case]:
    yield _case("two_ranks-steps", _OF_STEPS, ranks=2)
    yield _case("two_ranks-images", _OF_IMAGES, ranks=2)
    yield _case("two_ranks-search", "algorithm=smart_grpo_paper", ranks=2)
    resumed = (("checkpoint.every=1",), ("train.iterations=3", "resume=true"))
    yield _case("two_ranks-resume", _OF_STEPS, ranks=2, runs=resumed)
    for how in ("gathered", "sharded"):
        full = ("adaptation=full", f"adaptation.rollout_weights={how}")
        yield _case(f"two_ranks-full-{how}", _OF_STEPS, *full, ranks=2, runs=resumed)
    yield _case("reward_rank", _OF_STEPS, "distributed.reward_ranks=1", ranks=2)


def _models() -> Iterator[Case]:
    for model in MINIATURES:
        # in place of the embedding that FLUX has for it, an algorithm on images has no guidance
        of_steps, of_images = (_OF_STEPS, "algorithm.schedule.num_steps=6"), (_OF_IMAGES, "model.guidance_scale=1.0")
        small = (f"model={model}", *_MINIATURE)
        for recipe in (of_steps, of_images):
            short = recipe[0].partition("=")[2]
            for how in ("eager", "blocks", "graphs"):
                yield _case(f"{model}-{short}-{how}", *recipe, *small, f"compile={how}")
            fp8 = ("lossy=fp8", "compile=blocks")
            yield _case(f"{model}-{short}-fp8", *recipe, *small, *fp8)
        yield _case(f"{model}-oblong", *of_steps, *small, "compile=graphs", "model.resolution=[192,256]")
        yield _case(f"{model}-kl", *of_steps, *small, "algorithm.objective.kl_coef=0.01", "runtime.checkpointing=true")
        yield _case(f"{model}-full", *of_steps, *small, "adaptation=full", "compile=blocks")
        yield _case(f"{model}-two_ranks", *of_steps, *small, ranks=2)
        yield _case(f"{model}-two_ranks-full", *of_images, *small, "adaptation=full", ranks=2)
    for experiment in ("flow_grpo_sd35", "nft_sd35", "smart_grpo_sd35", "flow_grpo_flux"):
        yield Case(
            name=experiment,
            runs=(
                (
                    f"experiment={experiment}",
                    "model.weights=random",
                    "model.condition_cache=null",
                    "reward=jpeg_compressibility",
                    "prompts.path=pkg://fastgrpo.shapes/prompts/train.txt",
                    "prompts.held_out=pkg://fastgrpo.shapes/prompts/held_out.txt",
                    "train.iterations=1",
                    "evaluate.every=1000",
                ),
            ),
            is_large=True,
        )


def _case(
    name: str, *overrides: str, ranks: int = 1, package: str = "", runs: tuple[tuple[str, ...], ...] = ((),)
) -> Case:
    """Two iterations of 2 prompts x 4 samples, and evaluations, of the embedded model."""
    small = (
        "train.iterations=2",
        "train.prompts_per_iteration=2",
        "train.group_size=4",
        "runtime.micro_batch=4",
        "evaluate.images_per_prompt=1",
        "evaluate.num_steps=2",
    )
    return Case(name=name, runs=tuple((*small, *overrides, *run) for run in runs), ranks=ranks, package=package)
