"""Which signals a run hears, and what the first and the second of them do."""

import signal
import threading

import pytest

from fastgrpo.distributed.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before, request = signal.getsignal(number), StopRequest()
    with request.heard():
        signal.raise_signal(number)
        assert request.number == number
    assert signal.getsignal(number) is before


def test_the_second_interruption_stops_at_once_and_a_single_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with StopRequest().heard():
        signal.raise_signal(signal.SIGINT)
        assert "stopping after this iteration" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_torchruns_repetition_of_an_interruption_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    request = StopRequest()
    with request.heard():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert request.number == signal.SIGINT


def test_only_the_first_rank_says_that_it_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with StopRequest().heard():
        signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == ""


def test_a_thread_that_is_not_sent_signals_trains_without_them() -> None:
    seen: list[object] = []

    def run() -> None:
        request = StopRequest()
        with request.heard():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
