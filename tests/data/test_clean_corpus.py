"""The whole of cleaning: files in several languages to folders by language, resumed, refused, the same every time."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_clean_rules import GOOD

from megapoly.data.clean.ledger import Ledger
from megapoly.data.clean.machines import Machines
from megapoly.data.clean.pipeline import Reading, clean_corpus
from megapoly.data.clean.quality import Verdict
from megapoly.data.clean.steps import dealt
from megapoly.data.clean.tables import table
from megapoly.data.text_input import Limits
from megapoly.errors import DataError, MegapolyError

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "ko", "zh")


WORDS = {
    "en": ("the old ship and storm lamp that stair in fog of coin with rope be sail to bell have crow night morning harbour "
           "father keeper count window letter river mountain table garden stone winter summer bread").split(),
    "ko": ("낡은 배가 폭풍을 등불과 계단에서 안개는 동전을 밧줄로 돛이 종을 까마귀가 밤에 아침의 항구로 아버지는 등대지기가 세었다 창문을 "
           "편지는 강물을 산에서 식탁에 정원의 돌을 겨울에 여름이 빵을").split(),
    "zh": list("船风灯火台阶雾气硬币绳索帆钟声乌鸦夜早晨港口父亲守数窗信河山桌花园石冬夏面包的了是在和有不一我他"),
}  # fmt: skip


def prose(language: str, n: int) -> str:
    """A text that has hardly an n-gram in common with another one."""
    words = random.Random(f"{language} {n}").choices(WORDS[language], k=70)
    return ("" if language == "zh" else " ").join(words)


def document(language: str, n: int, **fields: Any) -> dict[str, Any]:
    """A text of its own, whatever the fields say over it."""
    text = f"{prose(language, n)}\n\t{n}"
    return {"text": text, "lang": language, "id": f"{language}-{n}", "source": "web", "x": [n]} | fields


def write(path: Path, lines: list[Any]) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Three files: languages mixed, twins across files, personal data, text without a language, short and foreign text."""
    first = [document(language, n) for n in range(12) for language in LANGUAGES]
    second = [document("en", 1) | {"id": "twin"}, document("en", 50, lang=None), document("ko", 50, lang="en"),
              document("en", 51, text="Short."), document("zh", 51, lang="sv"),
              {"text": "def f():\n    return 10000\n", "lang": "code"}, {"text": "if x:\n\ty = 1\n", "kind": "code"}]  # fmt: skip
    third = [document("ko", 52, text=GOOD["ko"] + "\n문의 010-1234-5678, abc@naver.com ㅋㅋㅋㅋㅋ", id=2**70)]
    third += [document("en", n) for n in range(60, 70)] + [
        document("en", 65, text=document("en", 65)["text"] + " and a bit")
    ]
    return [
        write(tmp_path / "a.jsonl", first),
        write(tmp_path / "b.jsonl.gz", second),
        write(tmp_path / "c.jsonl", third),
    ]


def kept(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        folder.name: [
            json.loads(line)
            for path in sorted(folder.glob("*.jsonl.gz"))
            for line in gzip.open(path, "rt", encoding="utf-8")
        ]
        for folder in sorted(out.iterdir())
        if folder.is_dir() and list(folder.glob("*.jsonl.gz"))
    }


def files_of(out: Path) -> dict[str, bytes]:
    is_left_out = {"work.partial", "plots", "report.md"}  # the page names pictures, which some of these runs lack
    wanted = [p for p in out.rglob("*") if p.is_file() and not is_left_out & set(p.relative_to(out).parts)]
    return {str(p.relative_to(out)): p.read_bytes() for p in wanted}


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else; one test has them."""
    if "page" not in request.node.name.split("_"):
        monkeypatch.setattr("megapoly.data.clean.report.has_matplotlib", lambda: False)


def test_documents_end_by_language_with_their_fields_and_the_report_adds_up(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = clean_corpus(inputs, str(out), log=quiet)
    assert report is not None
    found = kept(out)
    assert sorted(found) == ["code", "en", "ko", "zh"]
    assert {d["lang"] for d in found["en"]} == {"en"} and "en-50" in {d["id"] for d in found["en"]}
    assert [d["text"] for d in found["code"]] == ["def f():\n    return 10000\n", "if x:\n\ty = 1\n"]
    (personal,) = [d for d in found["ko"] if d["id"] == 2**70]
    assert personal["text"] == GOOD["ko"] + "\n문의 <|tel|>, <|email|> ㅋㅋ" and personal["x"] == [52]
    original = next(d for d in found["zh"] if d["id"] == "zh-3")
    assert original == document("zh", 3) and list(original) == list(document("zh", 3))
    rules = {rule: amount["documents"] for rule, amount in report["all"]["removed"].items()}
    assert rules == {
        "too short": 1,
        "other language": 1,
        "language not wanted": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    for part in [report["all"], *report["languages"].values()]:
        assert part["read"]["documents"] == part["kept"]["documents"] + sum(
            a["documents"] for a in part["removed"].values()
        )
    assert report["all"]["read"]["documents"] == 36 + 7 + 12
    assert report["all"]["kept"]["documents"] == sum(map(len, found.values()))
    assert report["languages"]["ko"]["mended"] == {"phone": 1, "email": 1, "emoticons": 1}
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_samples_and_page_show_what_went(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    clean_corpus(inputs, str(out), log=quiet)
    (sample,) = [json.loads(line) for line in (out / "removed/language-not-wanted.jsonl").open(encoding="utf-8")]
    assert (sample["lang"], sample["id"], sample["source"]) == ("sv", "zh-51", "web") and sample["text"].startswith(
        prose("zh", 51)[:20]
    )
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "**near duplicate**" in page and "| sv |" in page and "language not wanted" in page
    for name in ("kept", "rules"):
        assert (out / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG") and f"plots/{name}.png" in page


def test_output_depends_on_neither_workers_nor_the_moment(inputs: list[str], tmp_path: Path) -> None:
    clean_corpus(inputs, str(tmp_path / "one"), tasks=5, log=quiet)
    clean_corpus(inputs, str(tmp_path / "two"), tasks=5, machines=Machines(workers=3), log=quiet)
    first, second = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert first == second and len(first) > 10
    clean_corpus(inputs, str(tmp_path / "three"), tasks=2, log=quiet)
    by_id = [{lang: sorted(json.dumps(d, sort_keys=True) for d in found) for lang, found in kept(tmp_path / name).items()}
             for name in ("one", "three")]  # fmt: skip
    assert by_id[0] == by_id[1]
    assert first["report.json"] == files_of(tmp_path / "three")["report.json"]


def test_cleaning_what_is_clean_keeps_all_of_it(inputs: list[str], tmp_path: Path) -> None:
    clean_corpus(inputs, str(tmp_path / "one"), log=quiet)
    clean_corpus([str(tmp_path / "one/*/*.jsonl.gz")], str(tmp_path / "two"), log=quiet)
    assert kept(tmp_path / "one") == kept(tmp_path / "two")


def test_a_finished_run_does_nothing_and_another_one_is_refused(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = clean_corpus(inputs, str(out), log=quiet)
    assert sorted(path.name for path in (out / "work.partial").iterdir()) == ["ledgers", "logs", "state.json"]
    before, times = files_of(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.jsonl.gz")}
    assert clean_corpus(inputs, str(out), log=quiet) == first
    assert files_of(out) == before and times == {p: p.stat().st_mtime_ns for p in times}
    (tmp_path / "rules.yaml").write_text("rules: {min_characters: 10}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"begun with rules\.min_characters 50 instead of 10; .*--restart"):
        clean_corpus(inputs, str(out), str(tmp_path / "rules.yaml"), log=quiet)
    (tmp_path / "dedup.yaml").write_text("dedup: null\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"begun with dedup\.exact True instead of None"):
        clean_corpus(inputs, str(out), str(tmp_path / "dedup.yaml"), log=quiet)
    with pytest.raises(DataError, match="begun with tasks 3 instead of 2"):
        clean_corpus(inputs, str(out), tasks=2, log=quiet)
    with pytest.raises(DataError, match="begun with 3 inputs instead of 2"):
        clean_corpus(inputs[:2], str(out), tasks=3, log=quiet)
    with open(inputs[2], "a", encoding="utf-8") as file:
        file.write(json.dumps(document("zh", 99)) + "\n")
    with pytest.raises(DataError, match=r"c\.jsonl has changed"):
        clean_corpus(inputs, str(out), log=quiet)
    assert files_of(out) == before
    shutil.rmtree(out / "work.partial")
    with pytest.raises(DataError, match="is there already, from another run"):
        clean_corpus(inputs, str(out), log=quiet)
    clean_corpus(inputs[:1], str(out), restart=True, log=quiet)
    assert sum(map(len, kept(out).values())) == 36 and not (out / "removed/near-duplicate.jsonl").exists()


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(inputs: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/clean_corpus.py",
        "--tasks",
        "9",
        "--workers",
        "1",
        "--input",
        *inputs,
        "--output-dir",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "whole")], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "report: 1 tasks" in done.stdout and "near" not in done.stderr and done.stderr == ""
    out = tmp_path / "killed"
    for stage in ("rules", "signatures", "output"):
        process = subprocess.Popen(
            [*command, str(out)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        while process.poll() is None and not list(out.glob(f"work.partial/logs/{stage}/completions/*")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (out / "report.json").exists()
    again = subprocess.run([*command, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "rules:" not in again.stdout and files_of(out) == files_of(tmp_path / "whole")


def test_a_killed_worker_ends_the_run_in_one_line_instead_of_a_hang(inputs: list[str], tmp_path: Path) -> None:
    deadly = tmp_path / "sitecustomize.py"
    deadly.write_text(
        "import os, sys\n"
        "class Deadly:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'py3langid' and os.getppid() != int(os.environ['LAUNCHER']): os.kill(os.getpid(), 9)\n"
        "sys.meta_path.insert(0, Deadly())\n",
        encoding="utf-8",
    )
    code = (
        "import os, sys\n"
        "sys.path.insert(0, 'tools')\n"
        "import clean_corpus\n"
        "if __name__ == '__main__':\n"
        "    os.environ['LAUNCHER'] = str(os.getppid())\n"
        "    clean_corpus.main()\n"
    )
    (tmp_path / "start.py").write_text(code, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, str(tmp_path / "start.py"), "--input", *inputs, "--output-dir", str(tmp_path / "out"), "--workers", "2"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 2 and found.stderr.startswith("error: stage rules: a process was killed")
    assert found.stderr.count("\n") == 1


BAD = ["{broken", '{"lang": "en"}', '{"text": 5}', '[1]', '{"text": "\\ud800"}', '{"text": "' + "x" * 5000 + '"}']  # fmt: skip


def test_bad_lines_end_the_run_with_their_place_or_are_counted(tmp_path: Path) -> None:
    for number, line in enumerate(BAD[:5]):
        path = write(tmp_path / f"bad{number}.jsonl", [document("en", 1), line])
        with pytest.raises(DataError, match=rf"bad{number}\.jsonl, line 2: .*--on-bad-line skip"):
            clean_corpus([path], str(tmp_path / f"out{number}"), log=quiet)
    path = write(tmp_path / "all.jsonl", [document("en", 1), *BAD, b"\xff".decode("latin-1"), document("en", 2)])
    raw = Path(path).read_bytes().replace("ÿ".encode(), b"\xff")
    Path(path).write_bytes(raw)
    reading = Reading(skip_bad_lines=True, limits=Limits(line_bytes=4096))
    report = clean_corpus([path], str(tmp_path / "out"), reading=reading, log=quiet)
    assert report is not None and report["all"]["kept"]["documents"] == 2
    assert report["all"]["bad_lines"] == {
        "invalid UTF-8": 2, "line too long": 1, "malformed JSON": 1, "missing key": 1, "wrong type": 2,
    }  # fmt: skip
    assert "Lines that are no document" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


def test_damaged_and_missing_files_end_in_one_line(inputs: list[str], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(Path(inputs[1]).read_bytes()[:-30])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments, message in (
        (["--input", str(damaged), inputs[0]], "damaged.jsonl.gz: damaged or truncated"),
        (["--input", inputs[0], "--sbatch", "account"], "NAME=VALUE"),
        (["--input", inputs[0], "--max-line-mib", "0"], "--max-line-mib (0) must be above 0"),
        (
            ["--input", inputs[0], "--config", "no.yaml"],
            "error: no.yaml: cannot be read: No such file or directory; check",
        ),
    ):
        command = [
            sys.executable,
            "tools/clean_corpus.py",
            *arguments,
            "--output-dir",
            str(tmp_path / "x"),
            "--workers",
            "2",
        ]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
        assert message in found.stderr


def test_what_cannot_be_done_is_said_before_any_work(inputs: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "x")
    for message, call in (
        ("none.jsonl: cannot be read", lambda: clean_corpus([str(tmp_path / "none.jsonl")], out)),
        ("a.jsonl: File exists", lambda: clean_corpus(inputs, inputs[0])),
        (r"--tasks \(0\)", lambda: clean_corpus(inputs, out, tasks=0)),
        (r"--workers \(0\)", lambda: clean_corpus(inputs, out, machines=Machines(workers=0))),
        ("--partition", lambda: clean_corpus(inputs, out, machines=Machines("slurm"))),
    ):
        with pytest.raises(MegapolyError, match=message):
            call()
    assert not Path(out).exists()


def test_parquet_and_an_empty_file_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [document("ko", n) for n in range(5)]
    columns = {key: [row[key] for row in rows] for key in ("text", "lang", "id")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    report = clean_corpus(
        [str(tmp_path / "a.parquet"), write(tmp_path / "e.jsonl", [])], str(tmp_path / "out"), log=quiet
    )
    assert report is not None and report["all"]["kept"]["documents"] == 5
    assert [d["id"] for d in kept(tmp_path / "out")["ko"]] == [f"ko-{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("lines", "found"), [([], "no lines at all"), (["", " "], "no lines at all"), (["oops", "[]"], "2 bad lines")]
)
def test_inputs_without_a_document_are_refused_and_then_stand_in_nobodys_way(
    lines: list[Any], found: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "e.jsonl.gz", lines)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"e\.jsonl\.gz: no documents to write \({found}\)"):
            clean_corpus([path], str(tmp_path / "out"), reading=Reading(skip_bad_lines=True), log=quiet)
    report = clean_corpus([write(tmp_path / "e.jsonl.gz", [document("ko", 1)])], str(tmp_path / "out"), log=quiet)
    assert report is not None and report["all"]["kept"]["documents"] == 1


def test_a_run_that_ended_before_anything_was_done_does_not_bind_the_next(inputs: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match="key 'content' is missing"):
        clean_corpus(inputs, out, reading=Reading("content"), log=quiet)
    assert clean_corpus(inputs, out, log=quiet) == clean_corpus(inputs, str(tmp_path / "other"), log=quiet)


def test_what_is_skipped_and_a_run_that_keeps_nothing_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [document("en", 1, text="Short."), "oops", {"lang": "en"}, "[]", "{}"])
    said: list[str] = []
    report = clean_corpus(
        [path],
        str(tmp_path / "out"),
        reading=Reading(skip_bad_lines=True),
        machines=Machines(workers=1),
        log=said.append,
    )
    assert said[-1] == "warning: none of the 1 documents is kept; the report says why"
    assert report is not None
    lines = table(report)
    assert [line.split()[0] for line in lines] == ["language", "en", "all", "4"]
    assert lines[-1] == "4 bad lines left out (malformed JSON: 1, missing key: 2, wrong type: 1)"


def test_deduplication_can_be_left_out(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("dedup: null\n", encoding="utf-8")
    report = clean_corpus(inputs, str(tmp_path / "out"), str(tmp_path / "rules.yaml"), log=quiet)
    assert report is not None and not {"exact duplicate", "near duplicate"} & set(report["all"]["removed"])


@pytest.mark.parametrize(("files", "tasks"), [(3, 1), (3, 2), (3, 3), (3, 8), (1, 5), (7, 5)])
def test_every_chunk_of_every_file_is_dealt_to_exactly_one_task(files: int, tasks: int) -> None:
    names = [f"f{i}" for i in range(files)]
    seen = Counter(
        (path, chunk)
        for rank in range(tasks)
        for path, share, shares in dealt(names, rank, tasks)
        for chunk in range(share, 12, shares)
    )
    assert seen == Counter((name, chunk) for name in names for chunk in range(12))


def test_samples_are_the_same_however_they_are_gathered(tmp_path: Path) -> None:
    whole, parts = Ledger(3), [Ledger(3), Ledger(3)]
    for n in range(40):
        for ledger in (whole, parts[n % 2]):
            ledger.remove("en", Verdict("too short", f"{n}"), f"text {n}", {"id": str(n)})
    gathered = Ledger(3)
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.json")
        gathered.merge(tmp_path / f"{number}.json")
    assert gathered.samples() == whole.samples() and len(whole.samples()["too short"]) == 3
    assert gathered.languages["en"].removed["too short"].documents == 40


def test_invented_languages_do_not_fill_the_memory() -> None:
    ledger = Ledger(2)
    for n in range(3000):
        ledger.remove(f"x-{n}", Verdict("language not wanted", ""), f"text {n}", {})
    assert len(ledger.languages) <= 1001 and len(ledger.samples()["language not wanted"]) <= 1002
    assert sum(tally.removed["language not wanted"].documents for tally in ledger.languages.values()) == 3000


def test_a_file_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.jsonl")
    write(Path(path), [document("en", n) for n in range(3)])
    clean_corpus([path], str(tmp_path / "out"), log=quiet)
    assert len(kept(tmp_path / "out")["en"]) == 3


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, inputs: list[str], tmp_path: Path) -> None:
    monkeypatch.setattr("megapoly.data.clean.pipeline.PACKAGES", ("datatrove", "no_such_package"))
    with pytest.raises(MegapolyError, match=r"needs the package no_such_package; pip install 'megapoly\[clean\]'"):
        clean_corpus(inputs, str(tmp_path / "out"), log=quiet)
