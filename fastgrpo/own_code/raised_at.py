"""Where in a user's own file an exception was raised."""

import sysconfig
import traceback
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")
_LIBRARIES = (Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1])


def raised_at(error: BaseException) -> str:
    """``my_rewards.py, line 3``: the innermost line that is no package's, Python's or fastgrpo's; '' if there is none.

    Of a SyntaxError it is the line that cannot be read.
    """
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    own = [line for line in lines if _is_own(line[0])]
    return f"{_shown(own[-1][0])}, line {own[-1][1]}" if own else ""


def _is_own(file: str) -> bool:
    path = Path(file)
    # what has no file is named in angle brackets
    is_file = not file.startswith("<")
    return is_file and not set(_INSTALLED) & set(path.parts) and not any(map(path.is_relative_to, _LIBRARIES))


def _shown(file: str) -> Path:
    path = Path(file)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
