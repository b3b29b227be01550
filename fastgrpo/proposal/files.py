"""A learned proposal on disk: ``proposal.safetensors`` and ``config.json``, in a directory of their own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastgrpo.files.whole import write_whole
from fastgrpo.proposal.network import ProposalNetwork, ProposalShape

_WEIGHTS, _CONFIG = "proposal.safetensors", "config.json"


def save_proposal(network: ProposalNetwork, directory: Path) -> None:
    """Write both files; the directory may be there."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in network.state_dict().items()}
    write_whole(directory / _WEIGHTS, safetensors.torch.save(weights))
    write_whole(directory / _CONFIG, (json.dumps(network.shape.values, indent=2) + "\n").encode())


def load_proposal(directory: Path) -> ProposalNetwork:
    """The network on the CPU; ValueError for what is not a directory of ``save_proposal``."""
    try:
        values = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        return make_network(values, safetensors.torch.load_file(directory / _WEIGHTS))
    except (OSError, ValueError, TypeError, RuntimeError, ArithmeticError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{directory} holds no learned proposal ({' '.join(str(error).split())}); give a directory with {_WEIGHTS} "
            f"and {_CONFIG}, as a run's proposal/"
        ) from error


def make_network(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ProposalNetwork:
    """The network that plain data describe, with these weights."""
    network = ProposalNetwork(ProposalShape(**values))
    network.load_state_dict(dict(weights))
    return network.requires_grad_(False)
