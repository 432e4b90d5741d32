"""How a program ends: by a line and a status, by the signal of Ctrl-C, in silence where nobody reads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
from megapoly.errors import ConfigError, end_now, exit_on_error
def main():
    print("begins")
    {body}
exit_on_error(main)()
"""
LOGGED = PROGRAM.replace("(main)()", "(main, is_logged=True)()").replace("print(", "Console(True).say(")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("import atexit; atexit.register(os.abort); end_now(75)", 75, ""),
        (r"raise ConfigError('a.yaml: lr is\n  -1')", 2, "error: a.yaml: lr is -1\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "interrupted\n"),
    ],
)
def test_a_program_ends_in_one_line_and_with_all_it_printed(body: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "begins\n", said)


def test_a_program_that_nobody_reads_ends_in_silence() -> None:
    body = "[print('x' * 1000) for _ in range(1000)]"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait(timeout=60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("print('what waits')", 0),
        ("sys.exit(75)", 75),
        ("raise ConfigError('a.yaml: lr is -1')", 2),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    ],
)
def test_a_full_disk_under_the_log_does_not_change_the_status(body: str, status: int) -> None:
    program = "from megapoly.log import Console\n" + LOGGED.format(body=body)
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # so that there is something left to write at the end
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, env=env, timeout=60)
    assert done.returncode == status


def test_a_tool_whose_output_a_full_disk_does_not_take_fails() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(body="pass")], stdout=full, timeout=60)
    assert done.returncode not in (0, 2, 75)
