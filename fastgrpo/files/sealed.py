"""A directory that is whole or is refused: it appears by one rename, and its manifest names every byte in it.

Written in this order, each step made durable (fsync) before the next: the files, ``manifest.json`` with the size and
SHA-256 of each, the rename of the temporary sibling to its name.  Killed at any instant, it leaves a temporary
directory, never a half-written one under the final name; damage that comes later is found by the manifest.

One process calls ``write_sealed``.  Several, which may be on other machines but share the file system, do its steps:
one ``begin_sealed``, each ``write_files`` of its own, then the first one ``finish_sealed`` with the entries of all.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY = ".temporary_"
# what a directory of the same name becomes while its replacement takes its place
REPLACED = ".replaced_"
_FORMAT = 1
_NUM_THREADS = 4

# size and SHA-256 of a file
Entry = dict[str, Any]


def write_sealed(path: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Make the directory ``path`` of ``files``, each a function that writes it; replaces a directory of that name.

    Leaves nothing behind, and the old directory as it was, when it raises (OSError, or what a function raises).
    """
    temporary = begin_sealed(path)
    try:
        finish_sealed(temporary, path, write_files(temporary, files))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin_sealed(path: Path) -> Path:
    """An empty temporary directory for what will be ``path``; those that were left by a killed process are deleted."""
    for left in path.parent.glob(f"{TEMPORARY}{path.name}*"):
        shutil.rmtree(left, ignore_errors=True)
    # its own name each time: a process of an earlier attempt that is still alive must not write into this one
    temporary = path.with_name(f"{TEMPORARY}{path.name}_{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    return temporary


def write_files(temporary: Path, files: Mapping[str, Callable[[Path], object]]) -> dict[str, Entry]:
    """Write each file by its function and make it durable; what the manifest is to say of them."""
    # hashing and fsync both release the interpreter lock, so files overlap
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        entries = list(pool.map(lambda item: _write(temporary / item[0], item[1]), files.items()))
    _sync_directory(temporary)
    return dict(zip(files, entries, strict=True))


def finish_sealed(temporary: Path, path: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest and rename to ``path``; OSError if a file that another process wrote is not to be seen."""
    for name, entry in entries.items():
        file = temporary / name
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise OSError(f"{file} is not as another process wrote it; all of them must see the same file system")
    manifest = _manifest_text(entries)
    _write(temporary / MANIFEST, lambda path: path.write_text(manifest, encoding="utf-8"))
    _sync_directory(temporary)
    _move_into_place(temporary, path)


def read_sealed(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The files of a sealed directory.  ValueError, naming the file, if it is not complete and exactly as written."""
    entries = read_manifest(path)
    if set(entries) != set(names):
        raise ValueError(f"{path / MANIFEST} lists {sorted(entries)}, expected {sorted(names)}")
    return {name: _read(path / name, entry) for name, entry in entries.items()}


def read_manifest(path: Path) -> dict[str, Entry]:
    """What the manifest of the directory ``path`` says of each file; ValueError if it is missing or damaged."""
    manifest = path / MANIFEST
    try:
        text = manifest.read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        # its own text is the only thing that no hash covers, so it must be the one way to write what it says
        intact = text == _manifest_text(entries)
    except OSError as error:
        raise ValueError(f"{manifest} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest} is damaged ({error})") from error
    if not intact or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{manifest} is damaged or of another format than {_FORMAT}")
    return dict(entries)


def check_files(path: Path, entries: Mapping[str, Entry]) -> None:
    """ValueError, naming the file, unless these files of the directory ``path`` are exactly as written."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda item: _check(path / item[0], item[1]), entries.items()))


def _write(path: Path, write: Callable[[Path], object]) -> Entry:
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


def _check(path: Path, entry: Entry) -> None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    _compare(path, entry, size, found)


def _read(path: Path, entry: Entry) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    _compare(path, entry, len(content), hashlib.sha256(content).hexdigest())
    return content


def _compare(path: Path, entry: Entry, size: int, found: str) -> None:
    if size != entry.get("bytes"):
        raise ValueError(f"{path} has {size} bytes instead of {entry.get('bytes')}")
    if found != entry.get("sha256"):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
