"""Is anybody there?  Asked before a run, so that one whose judge is not running ends in seconds."""

import logging
import threading
import time
from collections.abc import Sequence

from fastgrpo.rewards.remote.connection import Connection
from fastgrpo.rewards.remote.errors import KEY, RemoteError, ServerFailed

_KNOCK_SECONDS = 5.0
_REST_SECONDS = 0.5
_log = logging.getLogger(__name__)


def wait_for_any(reward: str, urls: Sequence[str], path: str, connection: Connection, seconds: float) -> None:
    """Until one of the servers has answered something to GET ``path``; RemoteError after ``seconds``.

    The line that tells what is waited for comes with the first failure of each.
    """
    deadline = time.monotonic() + seconds
    is_there = threading.Event()
    causes: dict[str, str] = {}

    def knock(url: str) -> None:
        while not is_there.is_set() and (left := deadline - time.monotonic()) > 0:
            try:
                connection.knock(url + path, min(left, _KNOCK_SECONDS))
                return is_there.set()
            except ServerFailed as error:
                if url not in causes:
                    _log.warning("reward %r: waiting up to %g s for %s: %s", reward, seconds, url, error)
                causes[url] = str(error)
            is_there.wait(min(_REST_SECONDS, left))

    for url in urls:
        # daemons, since an interruption shall not wait for a server that does not answer
        threading.Thread(target=knock, args=(url.rstrip("/"),), daemon=True).start()
    if not is_there.wait(seconds):
        found = "; ".join(f"{url}: {cause}" for url, cause in sorted(causes.items())) or f"{', '.join(urls)}: silence"
        raise RemoteError(
            f"reward {reward!r}: nobody answered in {seconds:g} s ({found}); start the server, correct {KEY}."
            f"endpoints, or raise {KEY}.startup_patience_seconds if it only needs time"
        )
