"""Models of the hub (huggingface.co): which words are their ids, and in one line why one could not be had."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

# no part starts with a dot or a slash, so that none can lead out of the hub's cache
_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?", flags=re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository owner/name, and the branch, tag or commit of it, if one was asked for."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, path: str) -> "HubId | None":
        """Of owner/name or owner/name@revision; None for any other path."""
        found = None if ".." in path else _ID.fullmatch(path)
        return cls(found["repository"], found["revision"]) if found else None

    def file_names(self) -> list[str]:
        """The paths of its files inside the repository; OSError where the hub does not answer."""
        siblings = model_info(self.repository, revision=self.revision).siblings or []
        return [sibling.rfilename for sibling in siblings]

    def download(self, patterns: Sequence[str]) -> Path:
        """The directory of those of its files that match a pattern; OSError or ValueError where it fails."""
        return Path(snapshot_download(self.repository, revision=self.revision, allow_patterns=list(patterns)))

    def on_disk(self) -> Path | None:
        """The directory of what is there of it, if anything is; the hub is not asked."""
        try:
            return Path(snapshot_download(self.repository, revision=self.revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            return None

    def why_not(self, error: Exception, option: str, files: Sequence[str] = ()) -> str:
        """Why it could not be downloaded, and what to do; ``option`` is the config's key that asks for it."""
        causes = list(_chain(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            return (
                f"{option}={self} is for who has accepted its licence: do so at https://huggingface.co/"
                f"{self.repository}, then log in with `hf auth login`"
            )
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            return f"{option}={self} is not on the hub, or is private: correct the name, or log in with `hf auth login`"
        reason = f"{type(causes[-1]).__name__}: {str(causes[-1]).strip().partition(chr(10))[0]}"
        remedy = "where the hub can be reached"
        if constants.HF_HUB_OFFLINE:
            reason = f"it is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids to ask the hub"
            remedy = "unset HF_HUB_OFFLINE, or where the hub can be reached"
        wanted = [f"--revision {self.revision}"] * (self.revision is not None)
        # named alone, a file that the repository lacks would be an error
        wanted += [f"--include {name}" for name in files]
        command = " ".join(["hf download", self.repository, *wanted, "--local-dir DIRECTORY"])
        return (
            f"{option}={self} could not be downloaded ({reason}); {remedy} run `{command}`, bring the directory here "
            f"and set {option}=DIRECTORY"
        )

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
