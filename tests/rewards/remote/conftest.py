"""Short rests, and no token or proxy of the machine that the tests run on."""

import pytest

from fastgrpo.rewards.remote import endpoints


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_FIRST_REST_SECONDS", 0.05)
    monkeypatch.setattr(endpoints, "_LONGEST_REST_SECONDS", 0.4)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
