"""What a first GPU is asked, most valuable first: each step a process of its own, with a limit of its own.

In a command ``{checkout}`` is flow_grpo's and ``{scratch}`` a directory that all steps of a machine share.
A limit is what a step may take at worst, so that nothing is begun that could not end; most take a fraction of it.
"""

from dataclasses import dataclass

CHECKOUT, SCRATCH = "{checkout}", "{scratch}"
# distributions of pyproject.toml that a training run imports, beside torch and triton
_TRAINING = (
    "diffusers", "transformers", "peft", "accelerate", "safetensors", "hydra-core", "omegaconf", "rich", "matplotlib",
    "pillow", "numpy", "huggingface-hub", "requests", "tensorboard",
)  # fmt: skip
# a line a test, so that one that is cut off has said what it found
_GPU_TESTS = ("-m", "pytest", "-v", "-m", "gpu", "--tb", "short")
_TESTS = ("pytest", "pytest-xdist", "hypothesis", "scipy", "pillow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Step:
    """``command`` are python's arguments on a GPU, ``rehearsal`` those of the same in miniature on a CPU, if any."""

    name: str
    # what its figures tell
    tells: str
    # the most that it may take
    seconds: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None
    # distributions without which it is not begun
    needs: tuple[str, ...] = ()
    needs_checkout: bool = False
    # begun anew on each machine, since it is of the machine
    each_machine: bool = False


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *arguments)


# rounds follow one that compiles; fewer images than published, 18 for 36, and text encoders of one layer
_AGAINST = ("--checkout", CHECKOUT, "--batches", "2")
_AT_FULL_SIZE = (*_AGAINST, "--full", "--short-text", "--pipeline", f"{SCRATCH}/pipeline", "--threads", "0")


def _against(recipe: str, *arguments: str) -> tuple[str, ...]:
    return _module("flow_grpo", "--recipes", recipe, *_AT_FULL_SIZE, *arguments)


def _against_in_miniature(recipe: str, *arguments: str) -> tuple[str, ...]:
    return _module("flow_grpo", "--recipes", recipe, *_AGAINST, *arguments)


_TIMED = ("--rounds", "3", "--checks", "none")
_COMPILED = ("--theirs", "float16 compiled", "--ours", "compile=blocks")
_SD35 = ("model.weights=random", "reward=jpeg_compressibility", "reward.golden=false", "model.condition_cache=null")
_EMBEDDED = ("train.prompts_per_iteration=2", "train.group_size=2", "reward.golden=false")
# what 80 GB hold; planning them would compile for two more batches
_SIZES = ("runtime.sampling_batch=64", "runtime.decode_batch=16")
_NFT = (*_SIZES, "runtime.micro_batch=32")
# half the images of the published run
_FLOW = (*_SIZES, "runtime.micro_batch=16", "train.prompts_per_iteration=4")
# few samples, for launches to count
_GRAPHS = ("compile=graphs", "train.prompts_per_iteration=2", "runtime.micro_batch=8")

STEPS: tuple[Step, ...] = (
    Step(
        name="environment",
        tells="the machine, its compilers and packages",
        seconds=40,
        command=_module("first_contact.environment"),
        rehearsal=_module("first_contact.environment"),
        each_machine=True,
    ),
    Step(
        name="kernels",
        tells="whether each operator computes what its reference does, each test at each of its parameters once",
        seconds=110,
        command=(*_GPU_TESTS, "-n", "12", "-p", "benchmarks.first_contact.one_of_each", "tests/kernels"),
        needs=("triton", *_TESTS),
    ),
    Step(
        name="ceilings",
        tells="the fastest matrix products and copies, which all else is a share of",
        seconds=40,
        command=_module("first_contact.ceilings"),
        rehearsal=_module("first_contact.ceilings"),
        needs=("numpy",),
    ),
    Step(
        name="fast",
        tells="SD3.5-medium, flow_grpo's fast recipe: theirs as its config has it, ours eager and compiled",
        seconds=210,
        command=_against("fast", *_TIMED, "--theirs", "float16", "--ours", "", "--ours", "compile=blocks"),
        rehearsal=_against_in_miniature("fast", "--rounds", "2", "--checks", "none", "--theirs", "float32"),
        needs=_TRAINING,
        needs_checkout=True,
    ),
    Step(
        name="full",
        tells="SD3.5-medium, flow_grpo's recipe with guidance and KL: theirs as its config has it, ours compiled",
        seconds=310,
        command=_against("full", *_TIMED, "--theirs", "float16", "--ours", "compile=blocks"),
        rehearsal=_against_in_miniature("full", "--rounds", "2", "--checks", "none", "--theirs", "float32"),
        needs=_TRAINING,
        needs_checkout=True,
    ),
    Step(
        name="nft",
        tells="SD3.5-medium, DiffusionNFT's recipe, ours: 64 images an iteration",
        seconds=150,
        command=_module("first_contact.iteration", "nft", "experiment=nft_sd35", *_SD35, *_NFT),
        rehearsal=_module("first_contact.iteration", "nft", *_EMBEDDED),
        needs=_TRAINING,
    ),
    Step(
        name="bandwidth",
        tells="the operators beside plain PyTorch, torch.compile and a copy",
        seconds=240,
        command=_module("kernels", "--quick"),
        rehearsal=_module("kernels", "--check"),
        needs=("triton", "numpy"),
    ),
    Step(
        name="profile",
        tells="where the time of an iteration of flow_grpo_sd35 goes, by stage and kernel: 32 images",
        seconds=240,
        command=_module("first_contact.iteration", "profile", "--profile", "experiment=flow_grpo_sd35", *_SD35, *_FLOW),
        rehearsal=_module("first_contact.iteration", "profile", "--profile", *_EMBEDDED),
        needs=_TRAINING,
    ),
    Step(
        name="graphs",
        tells="the same with CUDA graphs and 16 images",
        seconds=180,
        command=_module("first_contact.iteration", "graphs", "experiment=flow_grpo_sd35", *_SD35, *_GRAPHS, *_SIZES),
        needs=_TRAINING,
    ),
    Step(
        name="rewards",
        tells="reward networks of official size, by backend, 64 images",
        seconds=180,
        command=_module(
            "rewards", "--rewards", "clip_score", "pick_score", "image_reward", "--repeats", "10",
            "--backends", "eager_float32", "eager_float16", "inductor_float16", "tensorrt_float16",
        ),
        rehearsal=_module("rewards", "--miniature", "--rewards", "clip_score", "--backends", "eager_float32"),
        needs=(*_TRAINING, "scipy"),
    ),
    Step(
        name="fast_compiled",
        tells="the fast recipe, flow_grpo's blocks compiled as well, which its script does not do",
        seconds=300,
        command=_against("fast", *_TIMED, *_COMPILED),
        needs=_TRAINING,
        needs_checkout=True,
    ),
    Step(
        name="full_compiled",
        tells="the recipe with guidance and KL, flow_grpo's blocks compiled as well",
        seconds=400,
        command=_against("full", *_TIMED, *_COMPILED),
        needs=_TRAINING,
        needs_checkout=True,
    ),
    Step(
        name="same_work",
        tells="that both sides have the same ratio and gradient at full size, before which no speed-up is claimed",
        seconds=300,
        command=_against("fast", "--checks", "only", "--theirs", "float16", "--ours", "", "--ours", "compile=blocks"),
        rehearsal=_against_in_miniature("fast", "--checks", "only", "--theirs", "float32"),
        needs=_TRAINING,
        needs_checkout=True,
    ),
    Step(
        name="tests",
        tells="all that is left of pytest -m gpu",
        seconds=420,
        command=(*_GPU_TESTS, "-n", "4", "tests"),
        needs=(*_TRAINING, *_TESTS),
    ),
)  # fmt: skip
