"""What a person sees: a live line on a terminal, plain lines elsewhere, nothing from other ranks."""

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


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 7325)] == ["0s", "59s", "1m00s", "59m59s", "1h00m", "2h02m"]
