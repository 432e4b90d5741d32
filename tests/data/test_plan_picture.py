"""The pictures: areas are the realised shares, stages are marked, and what does not fit is said in words."""

import itertools
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from test_curriculum import CODE, DIAL, EN, KO, OPUS, plan_of, tool
from test_curriculum import config_file as config_file  # a fixture

from megapoly.data.curriculum import Plan
from megapoly.data.plan_picture import colour_of, draw_text, short, stack_order, symbols, windows
from megapoly.data.plan_png import draw_png
from megapoly.errors import ConfigError

EIGHTEEN = "en zh es fr pt ru de it ar ja ko th vi id nl pl tr he".split()
STAGES: list[dict[str, Any]] = [
    DIAL | {"tokens": 600_000, "code_share": 0.1},
    DIAL | {"name": "rising", "tokens": 300_000, "non_english_share": {"from": 0.3, "to": 0.9}},
    DIAL | {"name": "s", "tokens": 20_000, "weights": {"web-en": 1.0}, "non_english_share": None},
]


def plan() -> Plan:
    return plan_of([EN, KO, OPUS, CODE], STAGES)


def test_windows_cover_every_sample_and_never_two_stages() -> None:
    seen = windows(plan(), 40)
    assert seen[0].begin == 0 and seen[-1].end == plan().num_samples
    assert all(a.end == b.begin for a, b in itertools.pairwise(seen))
    sources = plan().sampler().samples(0, plan().num_samples)[0]
    for window in seen:
        stage = plan().stages[window.stage]
        assert stage.begin_sample <= window.begin < window.end <= stage.end_sample
        part = sources[window.begin : window.end]
        shares = {"en": (part == 0).mean(), "ko": ((part == 1) | (part == 2)).mean(), "code": (part == 3).mean()}
        assert window.shares == pytest.approx(shares)


def test_the_areas_on_a_terminal_are_the_shares() -> None:
    lines = draw_text(plan(), rows=50).splitlines()
    body = [re.fullmatch(r".{6}\|([ek#.|]+)\|", line)[1].split("|") for line in lines[:50]]  # type: ignore[index]
    for number, stage in enumerate(plan().stages):
        cells = "".join(row[number] for row in body)
        counts = [end - begin for begin, end in zip(
            plan().sampler().counts(stage.begin_sample), plan().sampler().counts(stage.end_sample), strict=True
        )]  # fmt: skip
        en, ko, code = counts[0], counts[1] + counts[2], counts[3]
        for symbol, count in zip("ek#", (en, ko, code), strict=True):
            assert cells.count(symbol) / len(cells) == pytest.approx(count / stage.samples, abs=0.03)
    assert lines[50].count("+") == 4  # the axis, with the stages' borders
    assert "1 one 600K, 2 rising 300K, 3 s 20K" in lines[52] and lines[53].split() == "e en k ko # code".split()
    assert max(map(len, lines)) <= 100


def test_thin_languages_stand_together_and_are_named() -> None:
    sources = [{"name": code, "language": code} for code in EIGHTEEN]
    text = draw_text(plan_of(sources, [DIAL | {"tokens": 800_000}]))
    assert ". 17 under 5% each: " in text
    assert set(EIGHTEEN) <= set(re.findall("[a-z]{2}", text.split("each:")[1])) | {"en"}
    painted = draw_text(plan(), colours=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == draw_text(plan()) != painted


def test_every_language_has_a_symbol_and_a_colour_of_its_own() -> None:
    assert len(set(symbols([*EIGHTEEN, "code"]).values())) == 19 and symbols(["en", "code"]) == {"en": "e", "code": "#"}
    assert len(set(colour_of([*EIGHTEEN, "code"]).values())) == 19
    assert stack_order(plan()) == ["en", "ko", "code"]  # code on top, whatever its share
    assert [short(n) for n in (638e9, 97.5e6, 128, 1.5e12)] == ["638B", "97.5M", "128", "1.5T"]


def chunks(png: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.setdefault(png[at + 4 : at + 8], png[at + 8 : at + 8 + length])
        at += 12 + length
    return found


def test_the_png_shows_areas_in_the_colours_of_the_languages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    draw_png(plan(), str(path))
    header = struct.unpack(">II", chunks(path.read_bytes())[b"IHDR"][:8])
    assert header[0] > 1000 and header[1] > 500
    from matplotlib.image import imread

    image = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    area = {
        x: int((abs(image - [int(c[i : i + 2], 16) for i in (1, 3, 5)]).sum(1) == 0).sum())
        for x, c in colour_of(stack_order(plan())).items()
    }
    total = plan().sampler().counts(plan().num_samples)
    expected = {"en": total[0], "ko": total[1] + total[2], "code": total[3]}
    for language, count in expected.items():
        assert area[language] / sum(area.values()) == pytest.approx(count / sum(total), abs=0.02)


def test_a_png_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_png(plan(), str(tmp_path))


def test_the_tool_draws_both(config_file: Path, tmp_path: Path) -> None:
    done = tool(str(config_file), "--png", str(tmp_path / "a.png"))
    assert done.returncode == 0 and "100% |" in done.stdout and "e en" in done.stdout, done.stderr
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG" and zlib.crc32((tmp_path / "a.png").read_bytes())
    done = tool(str(config_file), "--png", str(tmp_path / "none/a.png"))
    assert done.returncode == 2 and "folder does not exist" in done.stderr and done.stdout == ""
