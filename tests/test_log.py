"""What a person sees: a live line on a terminal, plain lines elsewhere, nothing from other ranks."""

import errno
import io

import pytest

from megapoly.log import Console, duration


def test_plain_lines_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(is_main=True)
    console.progress("step 1")
    console.progress("step 2")
    console.say("saved")
    Console(is_main=False).say("nobody hears this")
    assert capsys.readouterr().out == "step 1\nstep 2\nsaved\n"


def test_a_terminal_gets_one_live_line_no_wider_than_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "10")
    console = Console(is_main=True)
    console.progress("step 1 of many")
    console.progress("step 2")
    console.say("saved")
    assert capsys.readouterr().out == "\r\x1b[2Kstep 1 of\r\x1b[2Kstep 2\nsaved\n"


class Full(io.TextIOBase):
    """Where nothing can be written."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, _: str) -> int:
        raise OSError(self.number, "")


def test_a_log_that_cannot_be_written_costs_its_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(is_main=True)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full(errno.ENOSPC))
        console.progress("step 1")
        console.say("saved")
        patch.setattr("sys.stdout", Full(errno.EPIPE))  # whose reader has gone: the program ends, as others do
        with pytest.raises(BrokenPipeError):
            console.say("nobody reads this")
    console.say("step 2")
    assert capsys.readouterr().out == "step 2\n"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 7325)] == ["0s", "59s", "1m00s", "59m59s", "1h00m", "2h02m"]
