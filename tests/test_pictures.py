"""Pictures: a name that cannot serve is refused before any work, and names in any script are drawn without a word."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megapoly.errors import ConfigError
from megapoly.pictures import checked_png, save_png

ROOT = Path(__file__).parents[1]
TOOLS = {
    "curriculum.py": ["tiny"],
    "show_schedule.py": ["--schedule", "1f1b", "--stages", "2", "--microbatches", "2"],
    "train_tokenizer.py": ["--input", "none.jsonl", "--output", "t.model", "--vocab-size", "300"],
}


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_refuses_another_kind_of_picture_before_any_work(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), *TOOLS[name], "--png", "x.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --png (x.txt) must end in .png\n")


def test_a_picture_that_could_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    assert checked_png(str(tmp_path / "A.PNG")) == str(tmp_path / "A.PNG")
    for name, message in (("folder.png", "cannot be written"), ("none/a.png", "the folder does not exist")):
        with pytest.raises(ConfigError, match=message):
            checked_png(str(tmp_path / name))
    monkeypatch.setattr("megapoly.pictures.has_matplotlib", lambda: False)
    with pytest.raises(ConfigError, match="needs matplotlib; pip install"):
        checked_png(str(tmp_path / "a.png"))


def test_letters_come_from_a_font_that_has_them_or_are_told_by_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    fonts = {entry.name: font_manager.get_font(entry.fname).get_charmap() for entry in font_manager.fontManager.ttflist}
    elsewhere = chr(min(set(fonts["STIXGeneral"]) - set(fonts["DejaVu Sans"])))
    figure = Figure()
    axes = figure.subplots()
    axes.set_yticks([0, 1], ["plain", "tick \U0010abcd"])
    axes.set_title(f"{elsewhere}é")
    axes.plot([0, 1], [0, 1], label="1\U0010abcd단계")
    legend = axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(figure, str(tmp_path / "a.png"), 50)
    assert capfd.readouterr() == ("", "")
    assert axes.get_title() == f"{elsewhere}é" and len(axes.title.get_fontfamily()) > 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "tick U+10ABCD "]
    assert legend.get_texts()[0].get_text().startswith("1U+10ABCD ")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
