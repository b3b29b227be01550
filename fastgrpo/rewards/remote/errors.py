"""What can go wrong on the way to another machine, by what helps against it."""

from fastgrpo.rewards.reward import RewardError

# of the fields of a remote reward; what stands for NAME is the config's
KEY = "reward.terms.NAME"


class RemoteError(RewardError):
    """The end: retries did not help or could not.  The message names reward, endpoint, attempts and cause."""


class ServerFailed(Exception):
    """A failed attempt after which the server should be left in peace, for ``rest_seconds`` if it asked for that.

    ``is_busy`` says that it works, but had too much to do.
    """

    def __init__(self, cause: str, *, rest_seconds: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(cause)
        self.rest_seconds, self.is_busy = rest_seconds, is_busy


class AskAgain(Exception):
    """An answer of a working server that lacks something; it may be asked for that again."""


class Refused(Exception):
    """An answer that would be the same however often one asks: a wrong token, name, size or request."""
