"""``fastgrpo COMMAND [key=value ...]``: what each command is called, and how it fails.

Exit codes: 0, 1 for a run that failed, 2 for bad input, 75 for one that a signal stopped and that is saved, 130 for an
interruption.  An expected failure is one line on stderr; with FASTGRPO_TRACEBACK=1 its traceback comes first.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.known_warnings import hide_known_warnings

# all else that takes more than a moment to import is imported inside main, which says in a line what went wrong
if TYPE_CHECKING:
    from omegaconf import DictConfig

FAILED, BAD_INPUT, PREEMPTED, INTERRUPTED = 1, 2, 75, 130


@dataclass(frozen=True, kw_only=True)
class Command:
    """``run`` is the dotted path of a function of the config: importing it takes seconds that --help need not wait."""

    run: str
    summary: str
    details: str
    examples: tuple[str, ...]
    # whether it takes seconds until it does anything, and whether it says so before
    loads: bool = True
    announces: bool = True

    def __call__(self, config: "DictConfig") -> None:
        module, _, name = self.run.rpartition(".")
        run: Callable[[DictConfig], Path | None] = getattr(import_module(module), name)
        # the first of several ranks says it for all
        if (written := run(config)) and os.environ.get("RANK", "0") == "0":
            print(f"written to {written}")


COMMANDS = {
    "train": Command(
        run="fastgrpo.training.train",
        summary="train a model on a reward",
        details="Writes everything about the run into output, checkpoints and the trained LoRA included; with "
        "resume=true it goes on from the newest complete checkpoint. adaptation.start= starts from a LoRA.",
        examples=(
            "fastgrpo train",
            "fastgrpo train name=baseline algorithm=flow_grpo train.iterations=60",
            "fastgrpo train name=baseline algorithm=flow_grpo train.iterations=60 resume=true",
            "fastgrpo train name=second adaptation.start=outputs/nft",
            "fastgrpo train model=sd35_medium reward=custom reward.path=my_rewards.redness",
            "fastgrpo train hardware=24gb prompts.path=train.txt prompts.held_out=test.txt",
        ),
    ),
    "runs": Command(
        run="fastgrpo.commands.runs.runs",
        summary="list runs and how they stand",
        details="A table of the runs in a directory and all those below it, the newest first: recipe, model, reward, "
        "evaluation first and last, images a second, and whether each is running, finished, stopped or failed. "
        "json=true prints it as JSON with everything that is known of each.",
        examples=("fastgrpo runs", "fastgrpo runs in=/data/outputs", "fastgrpo runs json=true | jq '.[0].state'"),
        loads=False,
    ),
    "submit": Command(
        run="fastgrpo.commands.submit.submit",
        summary="train as a job of a cluster",
        details="By Slurm. Its keys are those of train, and job.*: nodes, tasks, time. Waits for the job, which saves "
        "itself before its time is over, queues again and goes on. A script for sbatch that does the same is "
        "configs/slurm/train.sbatch. Needs the extra slurm.",
        examples=(
            "fastgrpo submit job.nodes=4 job.slurm.partition=gpu experiment=flow_grpo_sd35 name=first",
            "fastgrpo submit job.launcher=submitit_local job.tasks_per_node=2 job.gpus_per_node=2",
        ),
    ),
    "sample": Command(
        run="fastgrpo.commands.sample.sample",
        summary="make images of prompts",
        details="Writes one PNG an image, and grid.png with all of them. run= takes the model and the averaged weights "
        "of a finished run; search=true makes each image the best that it finds by the reward in budget=64 network "
        "evaluations. lora= takes a LoRA that was made elsewhere.",
        examples=(
            "fastgrpo sample prompt='a red circle left of a blue square'",
            "fastgrpo sample prompt='three green triangles' run=outputs/nft output=triangles",
            "fastgrpo sample prompt='a red kite' model=sd35_medium lora=lora.safetensors",
            "fastgrpo sample prompts.path=prompts.txt images_per_prompt=1 search=true budget=160 output=searched",
        ),
    ),
    "evaluate": Command(
        run="fastgrpo.commands.evaluate.evaluate",
        summary="measure rewards on held-out prompts",
        details="Starts from plain noise, the same in every evaluation. Prints a table and writes evaluation.json and "
        "a grid of images. run= evaluates a finished run, else the base model; lora= takes a LoRA that was made "
        "elsewhere. search=true evaluates the images that a search finds by the reward; rewards under reward.watch "
        "judge them without having been searched for.",
        examples=(
            "fastgrpo evaluate output=outputs/base_evaluation",
            "fastgrpo evaluate run=outputs/nft output=outputs/nft_evaluation",
            "fastgrpo evaluate run=outputs/nft/checkpoints/step_000100 evaluate.images_per_prompt=16",
            "fastgrpo evaluate lora=outputs/nft/lora output=outputs/lora_evaluation",
            "fastgrpo evaluate run=outputs/nft search=true budget=40 output=outputs/searched",
        ),
    ),
    "report": Command(
        run="fastgrpo.commands.report.report",
        summary="make one HTML page of what runs measured",
        details="Curves of all metrics, images before and after, where the time went, what a search saw, configs and "
        "machines, in one file that needs no network. Several runs are drawn beside each other. A run makes its own at "
        "its end; this makes it anew, also while the run still trains.",
        examples=(
            "fastgrpo report run=outputs/nft",
            "fastgrpo report run=outputs/baseline run=outputs/searched output=comparison.html",
        ),
    ),
    "export": Command(
        run="fastgrpo.commands.export.export",
        summary="write a run's weights for diffusers",
        details="Writes the averaged weights of the run's last checkpoint: lora/ for diffusers, ComfyUI and peft and, "
        "with merged=true, merged/ for from_pretrained of the model's pipeline, each with a model card and a "
        "generate.py that draws with it, and prints the call. lora= in place of run= writes the pipeline of a LoRA "
        "that was made elsewhere.",
        examples=(
            "fastgrpo export run=outputs/nft output=exported",
            "fastgrpo export run=outputs/nft output=exported merged=true",
            "fastgrpo export lora=lora.safetensors model=sd35_medium output=exported merged=true",
        ),
    ),
    "serve-reward": Command(
        run="fastgrpo.commands.serve_reward.serve_reward",
        summary="serve rewards to runs on other machines",
        details="Answers for every reward of the config, watched ones too, until SIGTERM; a run asks by reward=http. "
        "Loopback only, unless token_env names the environment variable with a token. Needs the extra serve.",
        examples=(
            "fastgrpo serve-reward reward=shapes",
            "fastgrpo serve-reward reward=pick_score host=0.0.0.0 port=8000 token_env=REWARD_TOKEN",
            "fastgrpo train reward=http reward.terms.http.name=pick_score "
            "reward.terms.http.endpoints=[http://gpu7:8000] reward.terms.http.token_env=REWARD_TOKEN",
        ),
        # who starts it reads its address in the first line
        announces=False,
    ),
    "encode": Command(
        run="fastgrpo.commands.encode.encode",
        summary="prepare the conditions of a prompt file",
        details="Runs the text encoders over every prompt that is not in model.condition_cache yet, and keeps the "
        "conditions there: runs on these prompts then load no text encoder. It can be stopped and started again.",
        examples=(
            "fastgrpo encode model=sd35_medium prompts.path=prompts.txt",
            "fastgrpo encode model=sd35_medium prompts.path=prompts.txt model.condition_cache=/data/conditions",
        ),
    ),
    "doctor": Command(
        run="fastgrpo.commands.doctor.doctor",
        summary="check that this machine computes right",
        details="Prints versions and backends, tries the rewards on golden pairs, then samples with the chosen "
        "model and algorithm and replays that under gradient: |ratio - 1| must be 0 in float32. Exit code 1 if a check "
        "fails. With memory= it plans the batches of training instead, for a GPU that need not be there; recommend= "
        "plans all models for one, and prints the commands that train those that fit. With prompts=FILE it shows what "
        "it reads of a prompt file instead, and loads no model.",
        examples=(
            "fastgrpo doctor",
            "fastgrpo doctor memory=80GiB model=sd35_medium model.weights=random num_prompts=8 group_size=24",
            "fastgrpo doctor recommend=24GiB",
            "fastgrpo doctor prompts=PartiPrompts.tsv",
            "fastgrpo doctor reward=pick_score reward_backend=tensorrt record=true",
            "fastgrpo doctor model=sd35_medium algorithm=flow_grpo_fast",
        ),
    ),
}
# a model chooses its time grid in these too, and nobody uses it
_DRAW_NOTHING = ("encode", "export")
_HELP, _DRY_RUN = ("--help", "-h"), "--dry-run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return _report(RuntimeError("interrupted"), INTERRUPTED)


def _main(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        return _show(f"fastgrpo {version('fastgrpo')}")
    if not words or words[0] in ("--help", "-h", "help"):
        if words:
            return _show(_overview())
        print(_overview(), file=sys.stderr)
        return BAD_INPUT
    try:
        command = _find_command(words[0])
        flags = [word for word in words[1:] if word in (*_HELP, _DRY_RUN)]
        overrides = [word for word in words[1:] if word not in flags]
        if words[0] == "doctor":
            # for the GPU of this machine
            overrides = ["recommend=here" if word == "recommend" else word for word in overrides]
        if {*flags} & {*_HELP}:
            return _show(_explanation(words[0], command, overrides))
        hide_known_warnings()
        if command.loads and command.announces and not flags and os.environ.get("RANK", "0") == "0":
            # importing torch and diffusers alone takes seconds
            print(f"fastgrpo {words[0]}: loading", flush=True)
        # it imports Hydra
        from fastgrpo.commands.line import config_of

        config = config_of(words[0], overrides)
        if flags:
            from fastgrpo.commands.dry_run import dry_run

            return _show(dry_run(words[0], config))
    except ValueError as error:
        return _report(error, BAD_INPUT)
    except (KeyError, AttributeError) as error:
        return _failed(error)
    return _run(command, config)


def _run(command: Command, config: "DictConfig") -> int:
    try:
        if command.loads:
            # by now load_config has imported the pieces that the config names, so this costs nothing
            from fastgrpo.models.quiet import hide_loading_bars

            hide_loading_bars()
        command(config)
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """The exit code of an error that is expected, which is reported; any other is raised again."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    from fastgrpo.checkpoints.checkpoint import CheckpointError
    from fastgrpo.distributed.world import RankFailure
    from fastgrpo.health import Preempted, TrainingError
    from fastgrpo.memory.batch_size import DoesNotFit
    from fastgrpo.out_of_memory import is_out_of_memory
    from fastgrpo.rewards.reward import RewardError

    try:
        raise error
    except Preempted as error:
        return _report(error, INTERRUPTED if error.signal_number == signal.SIGINT else PREEMPTED)
    except (TrainingError, RewardError, CheckpointError, DoesNotFit, RankFailure) as error:
        return _report(error, FAILED)
    except ValueError as error:
        return _report(error, BAD_INPUT)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = error.full_key
        return _report(ValueError(f"{key} is needed and is not there; leave out what deletes it (~{key})"), BAD_INPUT)
    except Exception as error:
        if is_out_of_memory(error):
            return _report(RuntimeError(f"out of GPU memory; lower runtime.micro_batch ({error})"), FAILED)
        _tell_launcher(error)
        raise


def _find_command(name: str) -> Command:
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    return COMMANDS[name]


def _show(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # in "fastgrpo train --help | head" nobody reads the rest, which Python would try to write once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report(error: Exception, code: int) -> int:
    if os.environ.get("FASTGRPO_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"fastgrpo: {' '.join(str(error).split())}", file=sys.stderr)
    _tell_launcher(error)
    return code


def _tell_launcher(error: Exception) -> None:
    """torchrun ends with what its first failed rank has told it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _overview() -> str:
    from fastgrpo.help import overview

    return overview(COMMANDS)


def _explanation(name: str, command: Command, overrides: Sequence[str]) -> str:
    from fastgrpo.commands.line import check_words
    from fastgrpo.help import explanation

    check_words(name, overrides)
    return explanation(name, command, overrides, "algorithm" if name in _DRAW_NOTHING else "")


if __name__ == "__main__":
    sys.exit(main())
