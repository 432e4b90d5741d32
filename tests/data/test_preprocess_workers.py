"""Worker processes: forked where that is safe, they hold nothing of the parent's and start with no needless work."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megapoly.data import text_input
from megapoly.data.preprocess import preprocess
from megapoly.data.progress import Progress
from megapoly.data.resume import only_writer
from megapoly.data.text_input import Chunk, Wanted, read_chunks
from megapoly.tokenizer import batch
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_byte_level_bpe, train_sentencepiece

ROOT = Path(__file__).parents[2]
TYPE = "SentencePieceTokenizer"
TEXTS = [f"document {i} says: 안녕 {'word ' * (i % 11)}\n{i * i}" for i in range(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    train_sentencepiece(TEXTS, path, 300)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return str(path)


def started(script: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that runs this with `preprocess` at hand; unlike the one of the tests it has one thread."""
    file = folder / "run.py"
    file.write_text(f"import multiprocessing\nfrom megapoly.data.preprocess import preprocess\n{script}")
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=given)


def test_forked_and_spawned_workers_write_the_same_bytes(
    tmp_path: Path, model: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 900)
    methods: list[str] = []
    get_context = multiprocessing.get_context

    def recorded(method: Any = None) -> Any:
        methods.append(method)
        return get_context(method)

    monkeypatch.setattr(multiprocessing, "get_context", recorded)

    def run(name: str, threads: int, workers: int) -> bytes:
        monkeypatch.setattr(threading, "active_count", lambda: threads)
        preprocess([source], str(tmp_path / name), TYPE, model, workers=workers, log_interval=0)
        return b"".join((tmp_path / f"{name}_text_document.{kind}").read_bytes() for kind in ("bin", "idx"))

    assert run("forked", 1, 2) == run("spawned", 2, 2) == run("alone", 1, 1)
    assert methods == ["fork", "spawn"]


def test_the_right_to_write_ends_with_the_parent_though_workers_hang(tmp_path: Path, model: str, source: str) -> None:
    script = f"""
def stop_workers(line):
    children = multiprocessing.active_children()
    if children:
        print(*[child.pid for child in children], flush=True)
        input()
preprocess([{source!r}], {str(tmp_path / "p")!r}, {TYPE!r}, {model!r}, workers=2, log_interval=1, log=stop_workers)
"""
    process = started(script, tmp_path)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    try:
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        with only_writer([str(tmp_path / "p_text_document")]):
            assert all(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    process.stdout.read()  # which ends when the workers have left as well
    process.stdout.close()


def test_workers_do_not_wait_for_threads_that_were_not_forked(tmp_path: Path, source: str) -> None:
    train_byte_level_bpe(TEXTS, str(tmp_path / "tokenizer.json"), 300)
    script = f"""
from megapoly.tokenizer.batch import LibraryEncoder
from megapoly.tokenizer.load import load_tokenizer
file = {str(tmp_path / "tokenizer.json")!r}
LibraryEncoder(load_tokenizer("HuggingFaceTokenizer", file)).encode(["a text"] * 9, [b"a text"] * 9)
preprocess([{source!r}], {str(tmp_path / "p")!r}, "HuggingFaceTokenizer", file, workers=2, log_interval=0,
           tokenizer_backend="tokenizers")
print("done")
"""
    process = started(script, tmp_path, TOKENIZERS_PARALLELISM="true")
    try:
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert said == "done\n"


def test_a_start_does_not_go_through_the_vocabulary(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(TYPE, model)
    asked: list[int] = []
    monkeypatch.setattr(tokenizer, "keeps_words_apart", lambda: bool(asked.append(1)))
    monkeypatch.setattr(batch, "LONG_CHARACTERS", 50)
    batch.choose_backend("sentencepiece", tokenizer, [])
    encoder = batch.make_encoder("sentencepiece", tokenizer)
    encoder.encode(["short"], [b"short"])
    assert not asked
    for text in ("a word " * 20, "another " * 20):
        encoder.encode([text], [text.encode()])
    assert asked == [1]


def numbered(chunks: list[Chunk]) -> list[tuple[int, bytes]]:
    return [line for chunk in chunks for line in chunk.lines()]


def test_only_the_end_of_the_last_file_comes_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_input, "END_BYTES", 2000)
    monkeypatch.setattr(text_input, "END_CHUNK_BYTES", 200)
    lines = b"".join(b'{"text": "%06d"}\n' % i for i in range(500))
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines)
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    chunks = list(read_chunks(paths, Wanted()))
    assert b"".join(chunk.data for chunk in chunks if isinstance(chunk.data, bytes)) == 2 * lines
    sizes = {path: [len(bytes(chunk.data or b"")) for chunk in chunks if chunk.path == path] for path in paths}  # type: ignore[arg-type]
    assert min(sizes[paths[0]][:-1]) > 900
    assert min(sizes[paths[1]][:5]) > 900 and max(sizes[paths[1]][-8:]) <= 200 + 18
    for i in (5, 12, 15, len(chunks) - 3):
        rest = list(read_chunks(paths, Wanted(), chunks[i].end))
        assert numbered(rest) == numbered(chunks[i + 1 :])


def test_the_bar_starts_no_thread(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    before = threading.active_count()
    with Progress(100, 1, lambda line: None, bar=True) as progress:
        progress.begin(0, 0)
        progress.advance(50, 1)
        assert threading.active_count() == before
    assert capsys.readouterr().err
