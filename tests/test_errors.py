"""How a program ends: by a line and a status, by the signal of Ctrl-C, in silence where nobody reads."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from megapoly.errors import ConfigError, Echo, exit_on_error
def main():
    print("begins")
    {body}
exit_on_error(main)()
"""


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
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
