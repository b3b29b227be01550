"""Which start noise a command draws: plain, or that of a learned proposal.

``proposal`` is ``none``, ``run`` for that of the run whose model is taken, ``auto`` for the same where it has one, or a
directory as ``fastgrpo export`` writes it.
"""

from pathlib import Path

from omegaconf import DictConfig

from fastgrpo.algorithm.image_search import NoSearch
from fastgrpo.algorithm.noise import Starts, plain_starts
from fastgrpo.commands.trained import load_proposal_of_run
from fastgrpo.files.locations import resolve_path
from fastgrpo.models.adapter import FlowModel
from fastgrpo.parts import read_search
from fastgrpo.proposal.files import load_proposal
from fastgrpo.proposal.network import ProposalNetwork


def wanted_proposal(config: DictConfig) -> ProposalNetwork | None:
    """The proposal that a config names, None for plain noise, from which a search begins too.

    ValueError for what is not there, before any model is.
    """
    is_searched = not isinstance(read_search(config), NoSearch)
    return None if is_searched else _find(str(config.proposal), config.run)


def starts_of(network: ProposalNetwork | None, config: DictConfig, model: FlowModel, text: str) -> tuple[Starts, str]:
    """How start noise is drawn, and in words what it is if it is not plain; ValueError if it is not for the model.

    text: some prompt, which is encoded to see how wide a text is.
    """
    if network is None:
        return plain_starts, ""
    where = f"proposal={config.proposal}" + f" of run={config.run}" * (config.proposal in ("run", "auto"))
    network.check_fits(model.latent_shape, model.encode([text]), where)
    return network.to(model.device).starts, f"with learned start noise, {where}"


def _find(proposal: str, run: str) -> ProposalNetwork | None:
    if proposal == "none" or (proposal == "auto" and not run):
        return None
    if proposal not in ("run", "auto"):
        return load_proposal(Path(resolve_path(proposal)))
    if not run:
        raise ValueError("proposal=run takes the proposal of a run, and run is empty; give run=DIRECTORY")
    network = load_proposal_of_run(run)
    if network is None and proposal == "run":
        raise ValueError(f"run={run} has learned no proposal; use proposal=none, or train with algorithm/noise=learned")
    return network
