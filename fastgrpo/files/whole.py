"""A small file that is replaced at once."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: whoever reads it, or resumes after a kill, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.temporary")
    temporary.write_bytes(content)
    os.replace(temporary, path)
