"""What a submitted job prints: the lines of its first rank as they come, shown by the process that waits for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOK_EVERY_SECONDS = 0.5


@contextmanager
def followed(folder: Path) -> Iterator[None]:
    """Inside, say which job there is in ``folder``, ``J/J_R_log.out``, and print what its first rank does."""
    over = threading.Event()
    follower = threading.Thread(target=_follow, args=(folder, over), daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def _follow(folder: Path, over: threading.Event) -> None:
    print("the job waits for its turn", flush=True)
    offsets: dict[Path, int] = {}
    is_last = False
    while not is_last:
        # once more after the end, for the last lines
        is_last = over.wait(_LOOK_EVERY_SECONDS)
        for log in sorted(folder.glob("*/*_0_log.out")):
            if log not in offsets:
                job = log.parent.name
                print(f"job {job} runs; errors of rank R are in {log.parent}/{job}_R_log.err", flush=True)
            offsets[log] = _print_from(log, offsets.get(log, 0), is_last)


def _print_from(log: Path, offset: int, is_last: bool) -> int:
    """Print the whole lines of a file from an offset on; where the next one begins."""
    try:
        with open(log, "rb") as file:
            file.seek(offset)
            text = file.read()
    # on a disk of other machines a file may go while it is read
    except OSError:
        return offset
    whole = text if is_last else text[: text.rfind(b"\n") + 1]
    if whole:
        print(whole.decode(errors="replace"), end="", flush=True)
    return offset + len(whole)


def remove_empty(folder: Path) -> None:
    """Remove directories below ``folder`` in which nothing is: Hydra and submitit make some before they know names."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
