"""A person's text to data, tokenizer and config: balanced, held out by id, done once, and small enough to be served."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megapoly.config import load_config
from megapoly.data import corpus
from megapoly.data.corpus import LanguageTable, make_config, prepare_corpus
from megapoly.data.indexed import IndexedDataset
from megapoly.data.preprocess import is_held_out
from megapoly.errors import DataError, MegapolyError
from megapoly.tokenizer.load import load_tokenizer

ROOT = Path(__file__).parents[2]
SENTENCES = {
    "en": "The old lighthouse keeper counted ships while the evening fog came in over the harbour.",
    "ko": "늙은 등대지기는 저녁 안개가 항구로 밀려오는 동안 지나가는 배를 세고 있었다.",
    "ru": "Старый смотритель маяка считал корабли, пока вечерний туман накрывал гавань.",
    "ar": "كان حارس المنارة العجوز يعد السفن بينما كان ضباب المساء يدخل إلى الميناء.",
    "th": "คนเฝ้าประภาคารชรานับเรือขณะที่หมอกยามเย็นลอยเข้ามาในท่าเรือ",
}


def write(path: Path, documents: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    return str(path)


def documents(languages: str, n: int = 30, **fields: Any) -> list[dict[str, Any]]:
    """n documents a language whose words differ, so that a vocabulary has something to learn."""
    return [
        {"id": f"d{i}", "lang": language, "text": f"{SENTENCES[language]} {i * 7919}\n{SENTENCES[language][i:]}"}
        | fields
        for language in languages.split()
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for language in SENTENCES:
        write(folder / f"{language}.jsonl", documents(language))
    prepare_corpus(sorted(map(str, folder.glob("*.jsonl"))), str(folder / "out"), vocab_size=600, valid_fraction=0.2)
    return folder


def test_translations_are_on_one_side_and_end_with_eod(prepared: Path) -> None:
    out = prepared / "out"
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(out / "tokenizer.model"))
    held_out = [i for i in range(30) if is_held_out(f"d{i}", 0.2)]
    assert held_out
    for language, sentence in SENTENCES.items():
        texts = []
        for side in ("", "valid_"):
            dataset = IndexedDataset(str(out / f"{language}_{side}text_document"))
            assert all(dataset[i][-1] == tokenizer.eod for i in range(len(dataset)))
            texts.append([tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset))])
        whole = [f"{sentence} {i * 7919}\n{sentence[i:]}" for i in range(30)]
        assert texts[1] == [whole[i] for i in held_out]
        assert texts[0] == [text for i, text in enumerate(whole) if i not in held_out]


def test_the_manifest_counts_what_is_there(prepared: Path) -> None:
    manifest = json.loads((prepared / "out" / "manifest.json").read_text())
    assert sorted(manifest["languages"]) == sorted(SENTENCES)
    for language, table in manifest["languages"].items():
        train, valid = (
            IndexedDataset(str(prepared / "out" / f"{language}_{side}text_document")) for side in ("", "valid_")
        )
        assert table["documents"] == 30 and table["held_out"] == len(valid)
        assert table["tokens"] == train.num_tokens + valid.num_tokens and table["held_out_tokens"] == valid.num_tokens
    on_disk = {p.name for p in (prepared / "out").iterdir()} - {".lock", "manifest.json"}
    assert on_disk == set(manifest["files"])


def test_it_is_done_once(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, out = sorted(map(str, prepared.glob("*.jsonl"))), prepared / "out"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    prepare_corpus(inputs, str(out), vocab_size=600, valid_fraction=0.2)
    assert "ready" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}


def test_other_inputs_options_or_lost_files_build_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "a.jsonl", documents("en ko")), tmp_path / "out"

    def is_built(**options: Any) -> bool:
        said: list[str] = []
        prepare_corpus([source], str(out), **({"vocab_size": 500} | options), log=said.append)
        return "nothing to do" not in said[0]

    assert is_built() and not is_built()
    with open(out / "en_text_document.bin", "ab") as file:
        file.write(b"12")
    assert is_built() and not is_built()
    assert is_built(valid_fraction=0.3)
    (out / "manifest.json").write_text("{not json")
    assert is_built(valid_fraction=0.3) and not is_built(valid_fraction=0.3)
    write(tmp_path / "a.jsonl", documents("en"))
    assert is_built(valid_fraction=0.3)
    assert not list(out.glob("ko_*")), "files of another text must not stay"


def test_the_result_is_deterministic(prepared: Path, tmp_path: Path) -> None:
    inputs = sorted(map(str, prepared.glob("*.jsonl")))
    prepare_corpus(inputs, str(tmp_path / "out"), vocab_size=600, valid_fraction=0.2)
    for path in (prepared / "out").iterdir():
        if path.name != "config.yaml":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes() or path.name == "manifest.json"


def test_the_tokenizer_has_not_seen_held_out_text(tmp_path: Path) -> None:
    name = next(f"k{i}" for i in range(99) if is_held_out(f"k{i}", 0.12))
    secret = [{"id": name, "lang": "en", "text": "xylophonequartz " * 50}]
    source = write(tmp_path / "a.jsonl", documents("en ko") + secret)
    prepare_corpus([source], str(tmp_path / "out"), vocab_size=500)
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "out" / "tokenizer.model"))
    assert len(tokenizer.encode(" xylophonequartz")) > 5


def test_languages_are_identified_kept_or_reduced(tmp_path: Path) -> None:
    unnamed = [{k: v for k, v in d.items() if k != "lang"} for d in documents("en ko ru ar th", 5)]
    named = documents("en", 3, lang="en-GB") + documents("ru", 4, lang="uk") + documents("ko", 2, lang="../Korean")
    manifest = prepare_corpus([write(tmp_path / "a.jsonl", unnamed + named)], str(tmp_path / "out"), 500, 0.0)
    counts = {language: table["documents"] for language, table in manifest["languages"].items()}
    assert counts == {"en": 8, "ko": 7, "ru": 5, "ar": 5, "th": 5, "uk": 4}
    assert sum(table["identified"] for table in manifest["languages"].values()) == 27


def test_a_small_text_gets_a_smaller_vocabulary_and_one_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": SENTENCES["ko"] * 40}])
    manifest = prepare_corpus([source], str(tmp_path / "out"))
    said = capsys.readouterr().out
    size = manifest["tokenizer"]["vocab_size"]
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "out" / "tokenizer.model"))
    assert size == tokenizer.vocab_size < 4096
    assert f"no vocabulary of 4096: the tokenizer has {size} pieces" in said and "no English: one stage" in said
    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    assert [(s.name, s.paths) for s in cfg.data.sources] == [("ko", [str(tmp_path / "out" / "ko_text_document")])]
    assert len(cfg.curriculum.stages) == 1 and cfg.curriculum.stages[0].weights is not None


def test_config_of_two_stages_is_read_and_finds_its_files(prepared: Path) -> None:
    cfg = load_config(str(prepared / "out" / "config.yaml"))
    assert [stage.non_english_share for stage in cfg.curriculum.stages] == [0.30, 0.60]
    assert {source.language for source in cfg.data.sources} == set(SENTENCES)
    for source in cfg.data.sources:
        assert all(Path(f"{path}.idx").is_file() for path in source.paths + source.valid_paths)
    assert cfg.tokenizer.tokenizer_model == str(prepared / "out" / "tokenizer.model")
    assert cfg.logging.run_dir == "runs/out"


@pytest.mark.parametrize(
    "tokens",
    [
        {"en": 5000, "ko": 4000, "no": 900},
        {"en": 900, "ko": 40000},
        {"en": 400000, "ko": 300000},
        {"en": 90000, "ko": 2000},
        {"en": 3000},
        {"ko": 3000, "zh": 30000, "ja": 100},
    ],
    ids=str,
)
def test_budgets_stay_below_four_epochs_and_the_limit(tmp_path: Path, tokens: dict[str, int]) -> None:
    seq_length, batch = 128, 16
    tables = {name: LanguageTable(tokens=n + 50, held_out_tokens=50) for name, n in tokens.items()}
    (tmp_path / "config.yaml").write_text(make_config("data/x", tables, seq_length, batch, lambda _: None))
    cfg = load_config(str(tmp_path / "config.yaml"))
    sources = {source.name: source for source in cfg.data.sources}
    assert set(sources) == {name for name, n in tokens.items() if n > seq_length}
    assert sum(stage.tokens for stage in cfg.curriculum.stages) <= 400_000
    served = dict.fromkeys(sources, 0.0)
    others = sum(source.weight for source in sources.values() if source.is_non_english)
    for stage in cfg.curriculum.stages:
        assert stage.tokens > 0 and stage.tokens % (seq_length * batch) == 0
        for name, source in sources.items():
            if stage.weights is not None:
                share = stage.weights[name] / sum(stage.weights.values())
            else:
                assert stage.non_english_share is not None
                share = 1 - stage.non_english_share
                if source.is_non_english:
                    share = stage.non_english_share * source.weight / others
            served[name] += stage.tokens * share
    for name, n in served.items():
        assert n <= 4.5 * ((tokens[name] - 1) // seq_length * seq_length) + 2 * seq_length
    if "en" not in tokens or len(sources) == 1:
        assert len(cfg.curriculum.stages) == 1
    else:
        assert len(cfg.curriculum.stages) == 2


def test_all_documents_held_out_means_none(tmp_path: Path) -> None:
    name = next(f"k{i}" for i in range(99) if is_held_out(f"k{i}", 0.12))
    said: list[str] = []
    one = [{"id": name, "lang": "en", "text": SENTENCES["en"] * 30}]
    manifest = prepare_corpus([write(tmp_path / "a.jsonl", one)], str(tmp_path / "out"), log=said.append)
    assert manifest["languages"]["en"]["held_out"] == 0 and "nothing is" in said[1]
    more = write(tmp_path / "b.jsonl", one + documents("ko"))
    manifest = prepare_corpus([more], str(tmp_path / "out"), vocab_size=500, log=said.append)
    assert set(manifest["languages"]) == {"ko"} and any(line.startswith("en: left out") for line in said)


def test_bad_input_is_one_line_and_not_called_ready(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "short.jsonl", [{"text": "only a few words", "lang": "en"}])
    for name, words in (("bad", "line 2"), ("empty", "no text"), ("short", "too little text"), ("absent", "No such")):
        for _ in range(2):
            with pytest.raises(DataError, match=words) as caught:
                prepare_corpus([str(tmp_path / f"{name}.jsonl")], out)
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(DataError, match="'English'"):
        prepare_corpus([], out, languages=["English"])
    with pytest.raises(DataError, match="qqq"):
        prepare_corpus([write(tmp_path / "q.jsonl", [{"text": "what is it"}])], out, languages=["en", "qqq"])


def test_a_failure_leaves_what_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, out = write(tmp_path / "good.jsonl", documents("en ko")), tmp_path / "out"
    prepare_corpus([good], str(out), vocab_size=500)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    write(tmp_path / "short.jsonl", [{"text": "only a few words", "lang": "en"}])
    for name, words in (("bad", "line 2"), ("short", "too little text")):
        with pytest.raises(DataError, match=words):
            prepare_corpus([str(tmp_path / f"{name}.jsonl")], str(out), vocab_size=500)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write(tmp_path / "good.jsonl", documents("ko ru"))
    # Cut off while files change places, it must not pass for either text.
    replace = os.replace
    with monkeypatch.context() as patch:
        late = out / "ru_text_document.bin"
        patch.setattr(os, "replace", lambda a, b: 1 / 0 if Path(b) == late else replace(a, b))
        with pytest.raises(ZeroDivisionError):
            prepare_corpus([good], str(out), vocab_size=500)
    assert not (out / "manifest.json").exists()
    manifest = prepare_corpus([good], str(out), vocab_size=500)
    assert sorted(manifest["languages"]) == ["ko", "ru"]


def test_held_out_text_of_an_unknown_past_does_not_stay(tmp_path: Path) -> None:
    source, out = write(tmp_path / "a.jsonl", documents("en")), tmp_path / "out"
    prepare_corpus([source], str(out), vocab_size=500)
    (out / "manifest.json").unlink()
    assert list(out.glob("en_valid_*"))
    prepare_corpus([source], str(out), vocab_size=500, valid_fraction=0.0)
    assert not list(out.glob("en_valid_*"))


def test_codes_of_three_letters_are_those_of_two() -> None:
    def identify(_: str) -> str:
        return "identified"

    assert set(corpus.TWO_LETTERS.values()) == set(corpus.LANGUAGES)
    for given, code in [("eng", "en"), ("ENG", "en"), ("fre", "fr"), ("chi", "zh"), ("zho-Hant", "zh"), ("dut", "nl"),
                        ("en_US", "en"), ("EN", "en"), ("sr-Latn", "sr"), ("fil", "fil")]:  # fmt: skip
        assert corpus.language_of({"lang": given, "text": ""}, identify) == (code, False)
    assert corpus.language_of({"lang": "English", "text": ""}, identify) == ("identified", True)


@pytest.mark.parametrize(
    ("option", "value"),
    [("valid_fraction", 1.0), ("valid_fraction", -0.1), ("valid_fraction", float("nan")), ("vocab_size", 0)],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_made(
    tmp_path: Path, option: str, value: float
) -> None:
    source = write(tmp_path / "a.jsonl", documents("en"))
    with pytest.raises(MegapolyError, match=option):
        prepare_corpus([source], str(tmp_path / "out"), **{option: value})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def _prepare(source: str, out: str, said: Any) -> None:
    prepare_corpus([source], out, vocab_size=500, log=said.put)


def test_several_processes_at_once_build_it_once(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", documents("en ko"))
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    processes = [context.Process(target=_prepare, args=(source, str(tmp_path / "out"), said)) for _ in range(3)]
    for process in processes:
        process.start()
    messages = []
    while any(process.is_alive() for process in processes) or not said.empty():
        while not said.empty():
            messages.append(said.get())
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum("nothing to do" in message for message in messages) == 2
    assert sum("train on it" in message for message in messages) == 1


def test_the_tools_run(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", documents("en ko"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    done = tool("prepare_corpus.py", "--input", source, "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0 and "bytes/token" in done.stdout, done.stderr
    for kind, output in (("SentencePieceTokenizer", "t.model"), ("HuggingFaceTokenizer", "t")):
        flags = ["--tokenizer-type", kind, "--output", str(tmp_path / output), "--vocab-size"]
        done = tool("train_tokenizer.py", "--input", source, *flags, "400")
        assert done.returncode == 0 and "ko " in done.stdout and "bytes/token" in done.stdout, done.stderr
        done = tool("train_tokenizer.py", "--input", source, *flags, "90000")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "largest possible" in done.stderr
        assert f"{source}: vocab_size" in done.stderr
    for words in (["--alpha", "nan"], ["--vocab-size", "x"], ["--vocab-size", "99999999999"], ["--what"]):
        done = tool("train_tokenizer.py", "--input", source, *flags, "400", *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for name in ("prepare_corpus.py", "preprocess_data.py"):
        done = tool(name)
        assert done.returncode == 2 and done.stderr.startswith("error: the following arguments are required")
        assert done.stderr.count("\n") == 1


def test_languages_are_those_of_polylm() -> None:
    assert len(set(corpus.LANGUAGES)) == 18
