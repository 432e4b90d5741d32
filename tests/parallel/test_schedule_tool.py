"""tools/show_schedule.py: the drawing, the figures, and one line for bad input."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.parallel.drawing import draw_text
from megapoly.parallel.schedule_check import check_schedule
from megapoly.parallel.timeline import Costs

ROOT = Path(__file__).parents[2]


def show(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/show_schedule.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_text_shows_every_action_at_its_time() -> None:
    assert draw_text(check_schedule("1f1b", 2, 1, 3).timeline).splitlines() == [
        "rank 0 |F0 F1 ......B0--- F2 B1--- ...B2--- |",
        "rank 1 |...F0 B0--- F1 B1--- F2 B2--- ......|",
    ]
    assert draw_text(check_schedule("zb-v", 2, 2, 1).timeline).splitlines() == [
        "rank 0 |F0a ........F0b I0b W0b ........I0a W0a |",
        "rank 1 |....F0a F0b ........I0b W0b I0a W0a ....|",
    ]


def test_all_ranks_share_a_head_at_the_same_time() -> None:
    assert draw_text(check_schedule("1f1b-vocab", 2, 1, 3).timeline).splitlines() == [
        "rank 0 |F0 ...H0 F1 ......H1 F2 B0--- H2 B1--- B2--- |",
        "rank 1 |...F0 H0 B0--- F1 H1 B1--- F2 H2 B2--- ......|",
    ]


@pytest.mark.parametrize("costs", [Costs(1, 1.37, 0.61), Costs(1e-6, 1e6, 1), Costs(1e6, 1e6, 1e-6)])
def test_rows_are_of_one_length_whatever_the_costs(costs: Costs) -> None:
    for name, chunks in (("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 3)):
        rows = draw_text(check_schedule(name, 3, chunks, 5, costs).timeline).splitlines()
        assert len({len(row) for row in rows}) == 1 and len(rows[0]) < 25_000


def test_the_tool_prints_the_figures_and_draws_the_picture(tmp_path: Path) -> None:
    png = tmp_path / "zb.png"
    done = show("--schedule", "zb-h1", "--stages", "4", "--microbatches", "8", "--png", str(png))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("rank 0 |F0 F1 F2 F3 .........I0 W0 F4 ")
    assert [line.split()[1] for line in lines[5:8]] == ["27", "3", "11.1%"]
    assert lines[8].startswith("peak activations    4 4 4 4 ")
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "message"), [
    ("--schedule zb-h3 --stages 4 --microbatches 8", "schedule (zb-h3) must be one of gpipe, 1f1b,"),
    ("--schedule 1f1b --chunks 2 --stages 4 --microbatches 8", "chunks (2) must be 1 for 1f1b; interleaved takes 2"),
    ("--schedule zb-v --chunks 3 --stages 4 --microbatches 8", "chunks (3) must be 2 for zb-v"),
    ("--schedule 1f1b --stages 0 --microbatches 8", "stages (0) must be at least 1"),
    ("--schedule 1f1b --stages four --microbatches 8", "--stages: invalid int value: 'four'"),
    ("--schedule 1f1b --stages 4 --microbatches 8 --costs 1,2", "--costs (1,2) must be F,I,W"),
    ("--schedule 1f1b --stages 4 --microbatches 8 --costs 1,nan,1", "--costs (1,nan,1) must be F,I,W"),
    ("--schedule 1f1b --stages 4 --microbatches 8 --costs 1,0,1", "--costs (1,0,1) must be F,I,W"),
    ("--schedule 1f1b --stages 4000 --microbatches 8000", "has 96000000 actions; 262144 can be shown"),
    ("--schedule 1f1b --stages 2 --microbatches 2 --png /nowhere/a.png", "--png (/nowhere/a.png): the folder does"),
    ("--schedule 1f1b --stages 2 --microbatches 2 --png a.pdf", "--png (a.pdf) must end in .png"),
    ("--schedule 1f1b --stages 2", "required: --microbatches"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(words: str, message: str) -> None:
    done = show(*words.split())
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_neither_the_tool_nor_what_it_uses_imports_torch_or_at_once_matplotlib() -> None:
    code = (
        "import runpy, sys; sys.argv = 'show --schedule 1f1b --stages 2 --microbatches 2'.split();"
        "runpy.run_path('tools/show_schedule.py', run_name='__main__');"
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0
