"""A larger real corpus, where one is at hand: MEGAPOLY_CORPUS names a folder of <language>.jsonl.gz files."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from ranks import run_ranks

from megapoly.config import load_config
from megapoly.data.corpus import prepare_corpus
from megapoly.data.indexed import IndexedDataset
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.tokenizer.load import load_tokenizer
from megapoly.train.prepare import prepare
from megapoly.train.setup import build_run
from megapoly.train.step import train_step

FOLDER = os.environ.get("MEGAPOLY_CORPUS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="MEGAPOLY_CORPUS does not name a folder of real text")
LANGUAGES = ("ar", "de", "en", "ja", "ko", "th", "zh")


def documents(language: str) -> list[dict]:
    with gzip.open(Path(FOLDER) / f"{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return random.Random(0).sample([d for d in found if len(d["text"]) > 200], 60)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict]]]:
    """60 documents of 7 languages; every other one has lost its `lang`."""
    folder = tmp_path_factory.mktemp("real")
    texts = {language: documents(language) for language in LANGUAGES}
    with (folder / "all.jsonl").open("w", encoding="utf-8") as file:
        for language, found in texts.items():
            for number, document in enumerate(found):
                kept = {"text": document["text"], "id": f"{language}-{number}"}
                file.write(json.dumps(kept | ({"lang": language} if number % 2 else {}), ensure_ascii=False) + "\n")
    prepare_corpus([str(folder / "all.jsonl")], str(folder / "data"), valid_fraction=0.0)
    return folder / "data", texts


def test_real_text_survives_identification_and_tokens(prepared: tuple[Path, dict[str, list[dict]]]) -> None:
    folder, texts = prepared
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / "tokenizer.model"))
    for language, found in texts.items():
        dataset = IndexedDataset(str(folder / f"{language}_text_document"))
        decoded = {tokenizer.decode([int(t) for t in dataset[i] if t != tokenizer.eod]) for i in range(len(dataset))}
        missing = [d["text"] for d in found if d["text"] not in decoded]
        assert len(missing) <= 1, f"{language}: {len(missing)} documents changed or went to another language"


def some_steps(mesh: Mesh, cfg: Config) -> list[float]:
    run = build_run(prepare(cfg, mesh.world.size, has_cuda=False), mesh)
    losses = []
    for step in range(1, 9):
        sums, counts = train_step(run, step).by_source
        losses.append((sums.sum() / counts.sum()).item())
    return losses


def test_real_text_trains_in_3d_parallel(prepared: tuple[Path, dict[str, list[dict]]], tmp_path: Path) -> None:
    folder, _ = prepared
    flags = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "run_dir": str(tmp_path / "run")}
    cfg = load_config(str(folder / "config.yaml"), flags | {"num_layers": 2, "lr_warmup_iters": 2, "vocab_size": 4096})
    losses = run_ranks(some_steps, cfg, tp=2, pp=2, dp=2)[0]
    assert losses[-1] < losses[0] - 0.3, losses
