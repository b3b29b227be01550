"""A directory that is whole or is refused: it appears by one rename, and its manifest names every byte in it.

Written in this order, each step made durable (fsync) before the next: the files, ``manifest.json`` with the size and
SHA-256 of each, the rename of the temporary sibling to its name.  Killed at any instant, it leaves a temporary
directory, never a half-written one under the final name; damage that comes later is found by the manifest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
TEMPORARY = ".temporary_"
# what a directory of the same name becomes while its replacement takes its place
REPLACED = ".replaced_"
_FORMAT = 1
_NUM_THREADS = 4


def write_sealed(path: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Make the directory ``path`` of ``files``, each a function that writes it; replaces a directory of that name.

    Leaves nothing behind, and the old directory as it was, when it raises (OSError, or what a function raises).
    """
    temporary = path.with_name(TEMPORARY + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        # hashing and fsync both release the interpreter lock, so files overlap
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            entries = list(pool.map(lambda item: _write(temporary / item[0], item[1]), files.items()))
        manifest = _manifest_text(dict(zip(files, entries, strict=True)))
        _write(temporary / MANIFEST, lambda path: path.write_text(manifest, encoding="utf-8"))
        _sync_directory(temporary)
        _move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_sealed(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The files of a sealed directory.  ValueError, naming the file, if it is not complete and exactly as written."""
    entries = _read_manifest(path / MANIFEST)
    if set(entries) != set(names):
        raise ValueError(f"{path / MANIFEST} lists {sorted(entries)}, expected {sorted(names)}")
    return {name: _read(path / name, entry) for name, entry in entries.items()}


def _write(path: Path, write: Callable[[Path], object]) -> dict[str, object]:
    write(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _move_into_place(temporary: Path, path: Path) -> None:
    replaced = path.with_name(REPLACED + path.name)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    _sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_text(entries: Mapping[str, object]) -> str:
    return json.dumps({"format": _FORMAT, "files": entries}, indent=2, sort_keys=True) + "\n"


def _read_manifest(path: Path) -> dict[str, dict[str, object]]:
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        # its own text is the only thing that no hash covers, so it must be the one way to write what it says
        intact = text == _manifest_text(entries)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not intact or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} is damaged or of another format than {_FORMAT}")
    return entries


def _read(path: Path, entry: Mapping[str, object]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) != entry.get("bytes"):
        raise ValueError(f"{path} has {len(content)} bytes instead of {entry.get('bytes')}")
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return content
