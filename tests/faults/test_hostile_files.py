"""Files from strangers: nothing in them executes, crashes a reader or makes it take memory; one line says what is wrong."""

import gzip
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile import HUGE, altered, doctored, fuzz, payload, refuses, reseal
from tiny_runs import run_to_end, tiny_config, tiny_prepared, write_tokens

from megapoly.checkpoint.folders import find_folders
from megapoly.checkpoint.load import CheckpointReader, load_checkpoint
from megapoly.checkpoint.report import contents, described, listed, listing, verify
from megapoly.checks import check
from megapoly.config import load_config
from megapoly.data.corpus import prepare_corpus
from megapoly.data.indexed import IndexedDataset
from megapoly.data.inspection import inspect
from megapoly.data.preprocess import preprocess
from megapoly.hf.tokenizer import read_sentencepiece, sentencepiece_to_tokenizers, write_tokenizer
from megapoly.parallel.mesh import single_process_mesh
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_sentencepiece
from megapoly.train.prepare import with_start
from megapoly.train.rows import drop_rows_after
from megapoly.train.setup import build_run

SECONDS = float(os.environ.get("MEGAPOLY_FUZZ_SECONDS", "3"))  # a reader
DEEP = b"[" * 200_000
TEXTS = [f'text {i} 안녕 <s> \x00 \\ " \U0001f600 {"word " * (i % 5)}' for i in range(25)]
SP, HF = "SentencePieceTokenizer", "HuggingFaceTokenizer"


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    """A file that payloads would make."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a payload was executed"


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    run_to_end(single_process_mesh(), tiny_config(folder, "gpt2", 2, num_layers=1, save_interval=1))
    return folder


@pytest.fixture
def home(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "home")
    return tmp_path / "home"


def step_folder(home: Path) -> Path:
    return home / "run/checkpoints/step_00000002"


def read_all(home: Path) -> None:
    """Everything that reads a checkpoint: tools, a resume, a load of the weights."""
    folder = step_folder(home)
    verify(folder)
    [listed(entry) for entry in listing(home / "run")]
    reader = CheckpointReader.open(folder)
    described(contents(reader))
    _ = reader.tokenizer_path, reader.loss_scaler, reader.optimizer_steps
    cfg = tiny_config(home, "gpt2", 2, num_layers=1, load=str(folder), run_dir=str(home / "other"))
    prepared = with_start(tiny_prepared(cfg), {})
    load_checkpoint(reader, build_run(prepared, single_process_mesh()).optimizer)


def test_what_reads_checkpoints_takes_a_sound_one(home: Path) -> None:
    assert refuses(lambda: read_all(home)) == ""


def test_pickles_in_a_checkpoint_are_not_looked_at(home: Path, mark: Path) -> None:
    folder = step_folder(home)
    for name in (".metadata", "__0_0.distcp", "pytorch_model.bin", "rng_state.pt"):
        (folder / name).write_bytes(payload(mark))
    assert refuses(lambda: read_all(home)) == ""
    for name in ("metadata.json", "state.json", "shard_00000.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(payload(mark))
        assert str(folder) in refuses(lambda: read_all(home)), name
        (folder / name).write_bytes(before)
    pickle.loads(payload(mark))  # the payload does execute where it is loaded
    assert mark.exists()
    mark.unlink()


@pytest.mark.parametrize(
    "name", ["../../../secret", "/etc/passwd", "shard_00000.safetensors/../../x", "a\0b", "..", "../outside"]
)
@pytest.mark.parametrize("where", ["chunk", "files"])
def test_a_name_in_a_checkpoint_is_no_path(where: str, name: str, home: Path) -> None:
    def change(tree: dict[str, Any]) -> dict[str, Any]:
        if where == "chunk":
            tree["tensors"]["model.final_norm.weight"]["chunks"][0][2] = name
        else:
            tree["files"][name] = [0, 0, 0]
        return tree

    (home / "run/checkpoints/outside").touch()  # there, and of the size and checksum that are claimed
    reseal(step_folder(home), change)
    assert "metadata.json" in refuses(lambda: read_all(home))


@pytest.mark.parametrize("huge", HUGE)
def test_a_shape_beyond_the_files_is_refused_before_memory_is_taken(huge: int, home: Path) -> None:
    def change(tree: dict[str, Any]) -> dict[str, Any]:
        record = tree["tensors"]["model.final_norm.weight"]
        record["shape"] = record["chunks"][0][1] = [huge]
        return tree

    reseal(step_folder(home), change)
    assert "model.final_norm.weight" in refuses(lambda: read_all(home)) or huge < 2**48


def test_many_chunks_do_not_take_the_square_of_their_number_in_memory(home: Path) -> None:
    def change(tree: dict[str, Any]) -> dict[str, Any]:
        record = tree["tensors"]["model.embedding.word.weight"]
        _, _, file, begin, _ = record["chunks"][0]
        record["chunks"] = [[[0, i], [1, 1], file, begin, 0] for i in range(100_000)]
        record["shape"] = [1, 100_000]
        return tree

    reseal(step_folder(home), change)
    assert "metadata.json" in refuses(lambda: read_all(home))


def test_the_number_of_dimensions_is_bounded(home: Path) -> None:
    new = {"dtype": "float32", "shape": [2**47] * 200_000, "chunks": []}  # whose product would take minutes
    reseal(step_folder(home), lambda tree: tree | {"tensors": tree["tensors"] | {"x": new}})
    assert "tensor 'x': cannot be: 200000 dimensions are more than 8" in refuses(lambda: read_all(home))


def test_fuzzed_metadata_of_a_forger(home: Path) -> None:
    folder = step_folder(home)
    before = (folder / "metadata.json").read_bytes()

    def attempt(rng: random.Random) -> None:
        (folder / "metadata.json").write_bytes(before)
        reseal(folder, lambda tree: doctored(tree, rng))
        refuses(lambda: read_all(home))

    fuzz(attempt, SECONDS)


def test_fuzzed_state_of_a_forger(home: Path) -> None:
    folder = step_folder(home)
    before = json.loads((folder / "state.json").read_bytes())

    def attempt(rng: random.Random) -> None:
        (folder / "state.json").write_text(json.dumps(doctored(before, rng)))
        reseal(folder)
        refuses(lambda: read_all(home))

    fuzz(attempt, SECONDS)


def test_fuzzed_bytes_of_every_file_of_a_checkpoint(home: Path) -> None:
    paths = [*sorted(step_folder(home).iterdir()), home / "run/checkpoints/latest"]
    contents_of = {path: path.read_bytes() for path in paths}

    def attempt(rng: random.Random) -> None:
        path = rng.choice(paths)
        path.write_bytes(altered(contents_of[path], rng))
        refuses(lambda: find_folders(home / "run"))
        refuses(lambda: read_all(home))
        path.write_bytes(contents_of[path])

    fuzz(attempt, SECONDS)


@pytest.mark.parametrize("content", [DEEP, b'{"step":' * 100_000, b"\xff\xfe\0", b'{"step": 1e999}', b"9" * 5000, b'{"step": true}'])  # fmt: skip
def test_rows_of_metrics_that_are_none_are_dropped(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n{"step": 3}\n')
    assert refuses(lambda: drop_rows_after(path, 2)) == ""
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


# --------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/new:subprocess.Popen [['touch', '{mark}']]",
        "model: !!python/name:os.system",
        "model: !!python/module:os",
        "data: !include /etc/passwd",
        "data: {{data_root: !!binary aGVsbG8=}}",
        "base: ../../../../etc/passwd",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c",
        "[" * 5000,
        "model: {{num_layers: 999999999999999999999999999999}}",
        "model: {{hidden_size: 0x" + "f" * 20_000 + "}}",
        "\0",
        *("model: !!bool maybe", "model: !!float ''", "model: !!timestamp x"),
    ],
)
def test_a_hostile_configuration_gives_one_line(text: str, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text.format(mark=mark))
    assert refuses(lambda: check(load_config(str(path), {}), 1)) != ""


DEEP_ALIASES = ", ".join(["&l0 [x, x]", *(f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGED = "\n".join(
    ["x0: &x0 {a: 1}", *(f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 12))]
)


@pytest.mark.parametrize("text", [f"logging: {{run_dir: [{DEEP_ALIASES}]}}", f"model: [{DEEP_ALIASES}]", MERGED,
                                  "logging: {run_dir: &a [*a]}", "logging: &a {run_dir: *a}"])  # fmt: skip
def test_aliases_of_aliases_take_no_memory(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert "with its aliases" in refuses(lambda: check(load_config(str(tmp_path / "c.yaml"), {}), 1))


def test_fuzzed_configurations(tmp_path: Path) -> None:
    before = load_config("tiny", {}).to_dict()
    path = tmp_path / "c.yaml"

    def attempt(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(altered(yaml.safe_dump(before, sort_keys=False).encode(), rng))
        else:
            path.write_text(json.dumps(doctored(before, rng)))
        refuses(lambda: check(load_config(str(path), {}), 1))

    fuzz(attempt, SECONDS)


# ------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(TEXTS, str(path), 300)
    return path


@pytest.fixture(scope="module")
def directory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Hugging Face keeps it."""
    folder = tmp_path_factory.mktemp("hf")
    write_tokenizer(load_tokenizer(SP, str(model)), folder, 300, 64)
    (folder / "tokenizer.model").unlink()
    return folder


def use(kind: str, path: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tokenizer = load_tokenizer(kind, str(path))
    tokenizer.decode(tokenizer.encode("text 안녕"))
    write_tokenizer(tokenizer, out, 10**6, 64)


@pytest.mark.parametrize("kind", [SP, HF])
def test_a_pickle_is_no_tokenizer(kind: str, mark: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(payload(mark))
    assert "tokenizer.json" in refuses(lambda: load_tokenizer(kind, str(tmp_path / "tokenizer.json")))


def test_code_beside_a_tokenizer_is_not_run_nor_exported(directory: Path, mark: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(directory, home)
    (home / "tokenization_x.py").write_text(f"open({str(mark)!r}, 'w')\nclass X: pass\n")
    config = json.loads((home / "tokenizer_config.json").read_text())
    config |= {
        "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]},
        "tokenizer_class": "X",
        "trust_remote_code": True,
    }
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    use(HF, home, tmp_path / "out")
    assert not (tmp_path / "out/tokenization_x.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff", DEEP, b'"text"', b'{"eos_token": ["</s>"], "bos_token": {"content": 3}}']
)
def test_a_damaged_file_of_a_tokenizer(name: str, content: bytes, directory: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(directory, home)
    (home / name).write_bytes(content)
    message = refuses(lambda: use(HF, home, tmp_path / "out"))
    assert name in message or (name != "tokenizer.json" and content[:1] in b'"{')


@pytest.mark.parametrize("number", [2**32 - 1, 2**31, 10**18, -1, 1.5, "7"])
def test_an_id_beyond_the_vocabulary_is_refused_before_a_model_has_its_rows(number: Any, tmp_path: Path) -> None:
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    tree = dict.fromkeys(names) | {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "merges": []}}
    for entries in ({"a": 0, "</s>": 1}, {"a": 0, "</s>": number}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree | {"model": tree["model"] | {"vocab": entries}}))
        message = refuses(lambda: load_tokenizer(HF, str(tmp_path / "tokenizer.json")))
        assert ("tokenizer.json" in message) == (entries["</s>"] == number)


def test_fuzzed_sentencepiece_models(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.model"

    def attempt(rng: random.Random) -> None:
        path.write_bytes(altered(model.read_bytes(), rng))
        refuses(lambda: sentencepiece_to_tokenizers(read_sentencepiece(path), path))
        refuses(lambda: use(SP, path, tmp_path / "out"))

    fuzz(attempt, SECONDS)


def test_fuzzed_tokenizer_directories(directory: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(directory, home)

    def attempt(rng: random.Random) -> None:
        name = rng.choice(["tokenizer.json", "tokenizer_config.json"])
        before = (directory / name).read_bytes()
        forged = json.dumps(doctored(json.loads(before), rng)).encode()
        (home / name).write_bytes(forged if rng.random() < 0.5 else altered(before, rng))
        refuses(lambda: use(HF, home, tmp_path / "out"))
        (home / name).write_bytes(before)

    fuzz(attempt, SECONDS)


# ------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("counts", [(10**18, 1), (1, 10**18), (2**64 - 1, 2**64 - 1), (2**61, 2**61)])
def test_an_index_that_counts_more_than_it_holds(counts: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, *counts) + bytes(8))
    assert "x.idx" in refuses(lambda: IndexedDataset(str(tmp_path / "x")))


def test_fuzzed_token_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "good", 2000, 0)
    before = {end: (tmp_path / f"good{end}").read_bytes() for end in (".idx", ".bin")}

    def read() -> None:
        dataset = IndexedDataset(str(tmp_path / "x"))
        dataset.check()
        for i in range(len(dataset)):
            assert dataset[i].max(initial=0) < 2**16
        inspect(str(tmp_path / "x"), 1003)

    def attempt(rng: random.Random) -> None:
        for end, content in before.items():
            (tmp_path / f"x{end}").write_bytes(altered(content, rng) if rng.random() < 0.6 else content)
        refuses(read)

    fuzz(attempt, SECONDS)


def jsonl() -> bytes:
    return b"".join(json.dumps({"id": i, "text": text, "lang": "ko"}).encode() + b"\n" for i, text in enumerate(TEXTS))


@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_fuzzed_texts(kind: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / kind
    pq.write_table(pa.table({"id": range(25), "text": TEXTS}), tmp_path / "t.parquet")
    sources = {".jsonl": jsonl(), ".gz": gzip.compress(jsonl()), ".parquet": (tmp_path / "t.parquet").read_bytes()}

    def attempt(rng: random.Random) -> None:
        path.write_bytes(altered(sources[path.suffix], rng))
        refuses(
            lambda: preprocess([str(path)], str(tmp_path / "p"), SP, str(model), on_bad_line="skip", log_interval=0)
        )

    fuzz(attempt, SECONDS)


@pytest.mark.parametrize("content", [payload(Path("executed")), DEEP, b'{"files": {"../../x": 1, "a": []}}', b"\xff", b"[]", b'{"files": 3}'])  # fmt: skip
def test_a_doctored_manifest_is_not_believed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.en.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}", "lang": "en"}) + "\n" for i in range(30))
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_bytes(content)
    (tmp_path / "x").write_text("y")
    refuses(lambda: prepare_corpus([str(tmp_path / "a.en.jsonl")], str(out), log=lambda *_: None))
    assert (tmp_path / "x").read_text() == "y"
