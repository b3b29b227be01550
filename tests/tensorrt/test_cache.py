"""Engines on disk: found again whole or built again, and never read from where others can write."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from fastgrpo.tensorrt.cache import EngineCache, cache_key

KEY = "ab" * 32
FACTS = {"weights": "w", "profile": [64, 64]}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "deep" / "engines")


def test_an_engine_comes_back_byte_for_byte_with_its_facts_in_plain_text(cache: EngineCache) -> None:
    assert cache.read(KEY) is None
    cache.write(KEY, b"\0plan", FACTS)
    assert cache.read(KEY) == b"\0plan"
    assert '"weights": "w"' in (cache.directory / KEY / "facts.json").read_text()
    cache.write(KEY, b"newer", FACTS)
    assert cache.read(KEY) == b"newer"
    cache.remove(KEY)
    assert cache.read(KEY) is None


def test_a_new_directory_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        cache = EngineCache(tmp_path / "engines")
        cache.write(KEY, b"plan", FACTS)
    finally:
        os.umask(before)
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert cache.read(KEY) == b"plan"


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest"])
def test_a_damaged_engine_is_not_read(cache: EngineCache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.write(KEY, b"a plan of some length", FACTS)
    path = cache.directory / KEY / ("manifest.json" if damage == "manifest" else "engine.plan")
    content = path.read_bytes()
    if damage == "lose":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert cache.read(KEY) is None
    assert "the engine is built again" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o755])
def test_a_directory_that_others_have_access_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "engines"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ValueError, match=rf"has mode {mode:o}: .* run chmod 700 {directory}"):
        EngineCache(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_a_directory_or_an_engine_of_another_user_is_refused(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines")
    cache.write(KEY, b"plan", FACTS)
    os.chown(cache.directory / KEY / "engine.plan", 12345, -1)
    with pytest.raises(ValueError, match=r"engine.plan belongs to user 12345, not to you"):
        cache.read(KEY)
    os.chown(cache.directory, 12345, -1)
    with pytest.raises(ValueError, match=r"belongs to user 12345, not to you \(0\).*set reward_backend.directory"):
        EngineCache(cache.directory)


def test_links_are_refused_wherever_they_lead(cache: EngineCache, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(cache.directory)
    with pytest.raises(ValueError, match=r"alias is a link to .*engines"):
        EngineCache(alias)

    cache.write(KEY, b"plan", FACTS)
    plan = cache.directory / KEY / "engine.plan"
    # the same bytes, so that only the link itself can give it away
    (tmp_path / "theirs").write_bytes(plan.read_bytes())
    plan.unlink()
    plan.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"engine.plan is a link"):
        cache.read(KEY)

    cache.remove(KEY)
    (cache.directory / KEY).symlink_to(tmp_path)
    with pytest.raises(ValueError, match=f"{KEY} is a link"):
        cache.read(KEY)


def test_a_directory_that_cannot_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made .*; set reward_backend.directory"):
        EngineCache(tmp_path / "file" / "engines")


def test_one_builds_while_the_others_wait(cache: EngineCache) -> None:
    order = []
    started, release = threading.Event(), threading.Event()

    def first() -> None:
        with cache.locked(KEY):
            started.set()
            release.wait(10)
            order.append("first")

    def second() -> None:
        with cache.locked(KEY):
            order.append("second")

    # flock is held by an open file, so threads exclude each other as processes do
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    # an engine of another key is not held up
    with cache.locked("cd" * 32):
        release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]


def test_a_lock_that_is_a_link_is_refused(cache: EngineCache, tmp_path: Path) -> None:
    (cache.directory / f"{KEY}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), cache.locked(KEY):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_is_given_back_when_building_fails(cache: EngineCache) -> None:
    with pytest.raises(ZeroDivisionError), cache.locked(KEY):
        raise ZeroDivisionError
    with open(cache.directory / f"{KEY}.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_key_depends_on_every_fact_and_on_no_order() -> None:
    facts = {"weights": "w", "profile": [1, 64], "device": {"name": "a", "driver": "1"}}
    key = cache_key(facts)
    assert key == cache_key(dict(reversed(facts.items())))
    changed: list[dict[str, object]] = [
        {**facts, "weights": "x"},
        {**facts, "profile": [64, 1]},
        {**facts, "device": {"name": "a", "driver": "2"}},
        {**facts, "more": None},
    ]
    assert len({key, *(cache_key(other) for other in changed)}) == 5
