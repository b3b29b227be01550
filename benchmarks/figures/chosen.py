"""The figures that are told, each read from a result file.  A new result takes the place of an old one here."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.figures.figure import Figure
from benchmarks.time_to_reward.curve import Curve, median

Data = dict[str, Any]

TIME_TO_REWARD = "time_to_reward_cpu_202611_8e655cf3c"
FLOW_GRPO = "flow_grpo_cpu_202611_64da16d5e"
MODELLED = "modelled_h100_202611_64da16d5e"
FAMILIES = "modelled_families_202611_496864e"
SEARCHED = "search_at_sampling_cpu_202611_27e2c5617"
RARE = "rare_success_cpu_202611_7e6478852"
READINGS = "search_readings_cpu_202611_7e6478852"
LEARNED = "learned_proposal_cpu_202611_7e6478852"
MEMORY = "memory_plan_counted_202611_3f773c635"

_FAST = "flow_grpo_code_fast_ema_1"


def times_sooner(side: str) -> Callable[[Data], str]:
    """How much sooner ``side`` is where flow_grpo's fast recipe ends, by medians over seeds."""

    def read(data: Data) -> str:
        theirs, ours = ([Curve.of_dict(curve) for curve in data["sides"][name]] for name in (_FAST, side))
        level = statistics.fmean(curve.final for curve in theirs)
        return f"{median([c.seconds_to(level) for c in theirs]) / median([c.seconds_to(level) for c in ours]):.1f}x"

    return read


def final_accuracy(*sides: str) -> Callable[[Data], str]:
    def read(data: Data) -> str:
        ends = [[Curve.of_dict(curve).final for curve in data["sides"][side]] for side in sides]
        return ", ".join(f"{statistics.fmean(end):.0%}" for end in ends)

    return read


def default_run(data: Data) -> str:
    before, after = data["runs"][0]["evaluations"][0]["eval/shapes_strict"], data["after"]
    return f"{before:.1%} to {after['mean']:.1%} ({after['lowest']:.1%} to {after['highest']:.1%})"


def longer_run(data: Data) -> str:
    ends = [row["eval/shapes_strict"] for row in data["evaluations"][2:]]
    return f"{min(ends):.0%} to {max(ends):.0%}"


def times_faster(side: str, recipes: Sequence[str] = ("full", "full_without_kl", "fast")) -> Callable[[Data], str]:
    """Of whole iterations in CPU time, where flow_grpo computes in the same type and is compiled alike."""

    def read(data: Data) -> str:
        found = {row["recipe"]: row["sides"] for row in data["results"]}
        return ", ".join(
            f"{found[recipe][side]['times_faster_than_alike']['CPU time']['median']:.2f}x" for recipe in recipes
        )

    return read


def modelled_speed(recipe: str, side: str = "ours") -> Callable[[Data], str]:
    return lambda data: f"{data['recipes'][recipe][side]['images_per_second']:.2f} images/s"


def modelled_gain(recipe: str) -> Callable[[Data], str]:
    def read(data: Data) -> str:
        ours, theirs = (data["recipes"][recipe][side]["images_per_second"] for side in ("ours", "flow_grpo"))
        return f"{ours / theirs:.1f}x ({ours:.2f} against {theirs:.2f} images/s)"

    return read


def passes(data: Data) -> str:
    found = {row["model"]: row["ms"] for row in data["passes"] if row["run"] == "sample" and row["resolution"] == 512}
    return ", ".join(f"{model} {ms:.0f} ms" for model, ms in found.items())


def plan_error(data: Data) -> str:
    return f"at most {max(abs(row['error']) for row in data['rows']):.1%} in {len(data['rows'])} cases"


def waits(data: Data) -> str:
    counts = {
        stage: sum(sum(found.values()) for name, found in data["waits"].items() if name.startswith(f"{stage}:"))
        for stage in ("rollout", "update")
    }
    pageable = data["copies"]["to the GPU, from pageable memory"]
    return f"update {counts['update'] // len(pageable)}, pageable copies to the GPU {sum(pageable.values())}"


def searched(policy: str, method: str, budgets: Sequence[int]) -> Callable[[Data], str]:
    """Strict accuracy of what was searched for by the graded verifier, without guidance."""

    def read(data: Data) -> str:
        found = {}
        for row in data["cells"]:
            cell = row["cell"]
            if (cell["policy"], cell["method"], cell["guidance_scale"]) == (policy, method, 1.0) and cell[
                "searched"
            ] == "verifier":
                found[cell["budget"]] = row["accuracy"]
        return ", ".join(f"{found[budget]:.0%}" for budget in budgets)

    return read


def band(name: str, group: int = 8) -> Callable[[Data], str]:
    """Accuracy at the end with and without retries, medians over seeds."""

    def read(data: Data) -> str:
        cells = []
        for method in ("nft", "nft, retries"):
            runs = [run for run in data["runs"] if (run["band"], run["method"], run["group"]) == (name, method, group)]
            ends = [run["points"][-1]["accuracy"] for run in runs]
            cells.append(f"{statistics.median(ends):.1%} ({min(ends):.1%} to {max(ends):.1%})")
        return f"{cells[0]} without, {cells[1]} with"

    return read


def readings(data: Data) -> str:
    ends = {
        name: statistics.fmean(Curve.of_dict(cell["curve"]).final for cell in cells)
        for name, cells in data["cells"].items()
    }
    best = max((name for name in ends if name != "flow_grpo"), key=ends.__getitem__)
    return f"flow_grpo {ends['flow_grpo']:.1%}, the best reading {ends[best]:.1%}"


def learned(policy: str) -> Callable[[Data], str]:
    """Strict accuracy on prompts never seen, from plain and from learned noise: medians over seeds and their range."""

    def read(data: Data) -> str:
        of_seeds = [results[f"judged_{policy}"]["held-out prompts"] for results in data["results"].values()]
        cells = []
        for name in ("plain", "learned"):
            means = [found[f"{name} shapes_strict"]["mean"] for found in of_seeds]
            cells.append(f"{name} {statistics.median(means):.0%} ({min(means):.0%} to {max(means):.0%})")
        return ", ".join(cells)

    return read


def faults(data: Data) -> str:
    jobs = data["jobs"]
    struck, failed = sum(len(job["struck"]) for job in jobs), sum(len(job["failures"]) for job in jobs)
    return f"{struck} faults, {failed} runs that differ"


def reward_faults(data: Data) -> str:
    cases = [run for run in data["runs"] if run["case"] != "undisturbed"]
    return f"{len(cases)} kinds of failure, {sum(len(run['failures']) for run in cases)} runs that differ"


def killed(data: Data) -> str:
    return f"{data['kills']} kills, {sum(bool(run['differences']) for run in data['runs'])} runs that differ"


def reward_speed(name: str) -> Callable[[Data], str]:
    def read(data: Data) -> str:
        (found,) = (row for row in data["results"] if row["reward"] == name)
        seconds = {side: found["seconds"][side]["whole"]["median"] for side in ("pil_one_by_one", "eager_bfloat16")}
        return f"{seconds['pil_one_by_one'] / seconds['eager_bfloat16']:.1f}x"

    return read


def embedded(key: str) -> Callable[[Data], str]:
    return lambda data: f"{data['results'][key]['shapes_strict']:.0%}"


# the four of the first screen
HEADLINE = (
    Figure(
        "embedded model: the accuracy that Flow-GRPO's own code (fast recipe) has after 5 minutes, reached by `nft`",
        TIME_TO_REWARD,
        lambda data: f"{times_sooner('nft')(data)[:-1]} times sooner",
    ),
    Figure(
        "embedded model: accuracy after those 5 minutes, Flow-GRPO's code, DiffusionNFT's code, ours",
        TIME_TO_REWARD,
        final_accuracy(_FAST, "nft_code_7_steps", "nft"),
    ),
    Figure(
        "SD3.5-medium: Flow-GRPO's full recipe, against flow_grpo's way of computing it",
        MODELLED,
        modelled_gain("Flow-GRPO, full recipe with KL"),
        "modelled",
    ),
    Figure(
        "embedded model, untrained: accuracy of the best of 8 images; 52% by one image in 80 steps",
        SEARCHED,
        searched("base", "best of N", (80,)),
    ),
)

FIGURES: dict[str, tuple[Figure, ...]] = {
    "Learning": (
        Figure(
            "`nft`, the default: sooner than flow_grpo's own code where that ends", TIME_TO_REWARD, times_sooner("nft")
        ),
        Figure("`awm`: the same", TIME_TO_REWARD, times_sooner("awm")),
        Figure("`v_grpo`: the same", TIME_TO_REWARD, times_sooner("v_grpo")),
        Figure("DiffusionNFT's own code: the same", TIME_TO_REWARD, times_sooner("nft_code_7_steps")),
        Figure(
            "strict accuracy after 300 s: flow_grpo's code (full, fast), DiffusionNFT's code, `nft`, `awm`, `v_grpo`",
            TIME_TO_REWARD,
            final_accuracy("flow_grpo_code_no_kl_ema_1", _FAST, "nft_code_7_steps", "nft", "awm", "v_grpo"),
        ),
        Figure("`fastgrpo train`, 10 minutes on 2 cores", "default_run_cpu_202611_e5cc436ec", default_run),
        Figure("the same three times as long, one seed", "default_run_long_cpu_202611_73cf85e4f", longer_run),
    ),
    "Speed": (
        Figure(
            "an iteration against flow_grpo's own functions, float32: full, without KL, fast",
            FLOW_GRPO,
            times_faster("ours model.decode_dtype=float32"),
        ),
        Figure("the same in bfloat16", FLOW_GRPO, times_faster("ours model.dtype=bfloat16")),
        Figure("the same, both compiled", FLOW_GRPO, times_faster("ours model.dtype=bfloat16 compile=blocks")),
        Figure(
            "the same with `train.gradients=reweight`: without KL, fast",
            FLOW_GRPO,
            times_faster(
                "ours train.gradients=reweight model.dtype=bfloat16 compile=blocks", ("full_without_kl", "fast")
            ),
        ),
        Figure(
            "SD3.5-medium, Flow-GRPO with KL, against flow_grpo's way of computing",
            MODELLED,
            modelled_gain("Flow-GRPO, full recipe with KL"),
            "modelled",
        ),
        Figure("the same without KL", MODELLED, modelled_gain("Flow-GRPO, full recipe without KL"), "modelled"),
        Figure("SD3.5-medium, NFT", MODELLED, modelled_speed("NFT (experiment=nft_sd35)"), "modelled"),
        Figure(
            "SD3.5-medium, Smart-GRPO, its search included",
            MODELLED,
            modelled_speed("Smart-GRPO (experiment=smart_grpo_sd35)"),
            "modelled",
        ),
        Figure(
            "FLUX.1-dev, 512x512, Flow-GRPO",
            MODELLED,
            modelled_speed("FLUX.1-dev at 512x512 (experiment=flow_grpo_flux)"),
            "modelled",
        ),
        Figure("a forward pass of 8 images at 512x512", FAMILIES, passes, "modelled"),
        Figure("waits of the host in an iteration's update", "host_waits_counted_202611_2b9139a77", waits, "counted"),
        Figure("error of the memory planner against what is allocated", MEMORY, plan_error, "counted"),
    ),
    "The search": (
        Figure(
            "best of N at 20, 40, 80, 160 network evaluations, untrained model",
            SEARCHED,
            searched("base", "best of N", (20, 40, 80, 160)),
        ),
        Figure("the same after NFT", SEARCHED, searched("trained", "best of N", (20, 40, 80, 160))),
        Figure(
            "more steps in its place, untrained, at 20, 40, 80", SEARCHED, searched("base", "more steps", (20, 40, 80))
        ),
        Figure("accuracy after 120 s where success is below 1%, groups of 4, retries", RARE, band("<1%", 4)),
        Figure("the same, groups of 8", RARE, band("<1%", 8)),
        Figure("the same, groups of 16", RARE, band("<1%", 16)),
        Figure("the same after 45 s where success is 1 to 5%, groups of 4", RARE, band("1-5%", 4)),
        Figure("the same, groups of 8, 1 to 5%", RARE, band("1-5%", 8)),
        Figure("the same, groups of 16, 1 to 5%", RARE, band("1-5%", 16)),
        Figure("Smart-GRPO's two readings against Flow-GRPO, 180 s", READINGS, readings),
        Figure("learned start noise, prompts never seen, untrained", LEARNED, learned("frozen")),
        Figure("the same after NFT", LEARNED, learned("trained")),
    ),
    "Reliability": (
        Figure("SIGKILL, resumed: weights bit for bit", "kill_resume_cpu_202611_73cf85e4f", killed),
        Figure("one of several ranks fails, job restarts", "rank_faults_cpu_202611_7b46927e2", faults),
        Figure("a reward server fails during a run", "reward_faults_cpu_202611_afd21a246", reward_faults),
    ),
    "Rewards and the embedded model": (
        Figure(
            "PickScore against flow_grpo's way of scoring", "rewards_cpu_202611_a5c68598f", reward_speed("pick_score")
        ),
        Figure("ImageReward: the same", "rewards_cpu_202611_48db3ce55", reward_speed("image_reward")),
        Figure(
            "the embedded model draws a held-out caption right",
            "embedded_model_cpu_202611_882a45276",
            embedded("images, guidance 1"),
        ),
        Figure("the same with guidance 2.5", "embedded_model_cpu_202611_882a45276", embedded("images, guidance 2.5")),
    ),
}
