"""A person's text in many languages to all that a small run needs: tokenizer, token files, a config to start."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from megapoly.config import load_config
from megapoly.data.preprocess import identity, is_held_out, preprocess, read_documents
from megapoly.errors import DataError
from megapoly.tokenizer.train import (
    VocabularyTooLarge,
    balance_languages,
    character_coverage,
    check_vocab_size,
    train_sentencepiece,
)

# PolyLM's languages (arXiv 2307.06018).
LANGUAGES = ("en", "zh", "es", "fr", "pt", "ru", "de", "it", "ar", "ja", "ko", "th", "vi", "id", "nl", "pl", "tr", "he")
UNDETERMINED = "und"
# ISO 639-3 (and the older 639-2/B) codes of the same languages.
TWO_LETTERS = dict(
    eng="en", zho="zh", chi="zh", cmn="zh", spa="es", fra="fr", fre="fr", por="pt", rus="ru", deu="de", ger="de",
    ita="it", ara="ar", jpn="ja", kor="ko", tha="th", vie="vi", ind="id", nld="nl", dut="nl", pol="pl", tur="tr",
    heb="he",
)  # fmt: skip
FORMAT = 1
ALPHA = 0.5
TOKENIZER_BYTES = 64 << 20
IDENTIFY_CHARACTERS = 2000
# The small default curriculum: PolyLM's two stages and shares over a text of kilobytes.
STAGES = (("stage1", 0.4, 0.30), ("stage2", 0.6, 0.60))
MOST_TOKENS = 400_000
MOST_EPOCHS = 4
_CODE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*")


@dataclass
class LanguageTable:
    """Counts of one language; `documents`, `bytes` and `tokens` are of training and held-out text together."""

    documents: int = 0
    held_out: int = 0
    identified: int = 0
    bytes: int = 0
    tokens: int = 0
    held_out_tokens: int = 0

    @property
    def train_tokens(self) -> int:
        return self.tokens - self.held_out_tokens


def prepare_corpus(
    inputs: Sequence[str],
    output_dir: str,
    vocab_size: int = 4096,
    valid_fraction: float = 0.12,
    languages: Sequence[str] = LANGUAGES,
    log: Callable[[str], None] = print,
    log_ready: bool = True,
) -> dict[str, Any]:
    """JSONL with {text, lang?, id?} to tokenizer, token files by language, manifest and config.yaml in output_dir.

    Where the manifest shows that the same inputs and options were prepared before, nothing is done (and said, unless
    log_ready is false); several processes may call this at once: the first does the work and logs it. A
    failure leaves what an earlier call has prepared. Returns the manifest. Raises DataError for unreadable input, bad
    lines and too little text, TokenizerError for a vocab_size that cannot be.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"valid_fraction ({valid_fraction}) must lie in [0, 1)")
    check_vocab_size(vocab_size)
    languages = [TWO_LETTERS.get(code, code) for code in languages]
    for code in languages:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            raise DataError(f"language '{code}' is no code of two or three small letters, such as en or ko")
    out = Path(output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            lock = stack.enter_context(open(out / ".lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            tiny = load_config("tiny")
            options = {
                "vocab_size": vocab_size,
                "valid_fraction": valid_fraction,
                "languages": languages,
                "alpha": ALPHA,
                "seq_length": tiny.data.block_length or tiny.model.seq_length,
                "global_batch_size": tiny.train.global_batch_size,
            }
            sources = [_describe(path) for path in inputs]
            manifest = _ready(out, sources, options)
            if manifest is not None:
                if log_ready:
                    log(f"{out}: the data is ready ({len(manifest['languages'])} languages); nothing to do")
                return manifest
            return _build(inputs, out, sources, options, log)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}; check --input and --output-dir") from None


def _describe(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
        return {"name": Path(path).name, "bytes": os.fstat(file.fileno()).st_size, "blake2b": digest}


def _ready(out: Path, sources: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if it describes these inputs and options and every file it names is there in full."""
    manifest = _read_manifest(out)
    if manifest.get("format") != FORMAT or manifest.get("inputs") != sources or manifest.get("options") != options:
        return None
    for name, size in _own_files(manifest).items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            return None
    return manifest


def _read_manifest(out: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _own_files(manifest: dict[str, Any]) -> dict[str, int]:
    """Files that a manifest names; only plain names within its own folder count."""
    files = manifest.get("files")
    return {name: size for name, size in files.items() if Path(name).name == name} if isinstance(files, dict) else {}


def _build(
    inputs: Sequence[str],
    out: Path,
    sources: list[dict[str, Any]],
    options: dict[str, Any],
    log: Callable[[str], None],
) -> dict[str, Any]:
    work = out / ".building"
    ready = work / "ready"
    shutil.rmtree(work, ignore_errors=True)
    ready.mkdir(parents=True)
    log(f"preparing {len(inputs)} files for {out} (once)")
    try:
        fraction = options["valid_fraction"]
        tables, characters = _split_by_language(inputs, work, options["languages"], fraction)
        if all(table.held_out == table.documents for table in tables.values()):
            log("every document would be held out: nothing is")
            fraction = 0.0
            tables, characters = _split_by_language(inputs, work, options["languages"], fraction)
        for language in [name for name, table in tables.items() if table.held_out == table.documents]:
            log(f"{language}: left out, as all of its {tables.pop(language).documents} documents are held out")
        vocab_size = _train_tokenizer(work, ready, sorted(tables), characters, options["vocab_size"], fraction, log)
        _write_tokens(work, ready, tables, fraction)
        _print_table(tables, log)
        config = make_config(str(out), tables, options["seq_length"], options["global_batch_size"], log)
        (ready / "config.yaml").write_text(config, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "inputs": sources,
            "options": options,
            "tokenizer": {"tokenizer_type": "SentencePieceTokenizer", "vocab_size": vocab_size},
            "languages": {name: asdict(table) for name, table in sorted(tables.items())},
            "files": {path.name: path.stat().st_size for path in sorted(ready.iterdir())},
        }
        _move_into_place(ready, out, manifest)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log(f"{out}: ready; train on it with --config {out / 'config.yaml'}")
    return manifest


def _move_into_place(ready: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Replace the files of an earlier call; one that was cut off here leaves no manifest, and is built again."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (ready / "manifest.json").write_text(text, encoding="utf-8")
    stale = set(_own_files(_read_manifest(out)))
    # Held-out text is found by its name alone, whether a manifest knows it or not.
    stale |= {f"{name}_valid_text_document{end}" for name in manifest["languages"] for end in (".bin", ".idx")}
    (out / "manifest.json").unlink(missing_ok=True)
    for name in manifest["files"]:
        os.replace(ready / name, out / name)
    for name in stale - set(manifest["files"]):
        (out / name).unlink(missing_ok=True)
    os.replace(ready / "manifest.json", out / "manifest.json")


# ------------------------------------------------------------------------------------------------- languages


class LanguageIdentifier:
    """py3langid restricted to the given languages; its model is read when the first text asks for it."""

    def __init__(self, languages: Sequence[str]) -> None:
        self._languages = list(languages)
        self._model: Any = None

    def __call__(self, text: str) -> str:
        """The language of a text, or `und` where nothing in it tells."""
        if self._model is None:
            from py3langid.langid import MODEL_FILE
            from py3langid.langid import LanguageIdentifier as Model

            self._model = Model.from_model_file(MODEL_FILE, norm_probs=True)
            try:
                self._model.set_languages(self._languages)
            except ValueError as error:
                raise DataError(f"languages cannot be told apart: {error}; give `lang` in the text instead") from None
        language, probability = self._model.classify(text[:IDENTIFY_CHARACTERS])
        is_told = len(self._languages) == 1 or probability > 1.001 / len(self._languages)
        return str(language) if is_told else UNDETERMINED


def language_of(document: dict[str, Any], identify: Callable[[str], str]) -> tuple[str, bool]:
    """A document's code of two letters (three where it has no other) and whether it had to be identified.

    `en-GB`, `EN` and `eng` are en. What is no code at all is identified.
    """
    given = document.get("lang")
    if isinstance(given, str) and _CODE.fullmatch(given):
        primary = re.split("[-_]", given)[0].lower()
        return TWO_LETTERS.get(primary, primary), False
    return identify(document["text"]), True


def _split_by_language(
    inputs: Sequence[str], work: Path, languages: Sequence[str], fraction: float
) -> tuple[dict[str, LanguageTable], Counter[str]]:
    """Write one JSONL file a language; returns the counts and the characters of the training text."""
    tables: dict[str, LanguageTable] = {}
    characters: Counter[str] = Counter()
    identify = LanguageIdentifier(languages)
    with ExitStack() as stack:
        files: dict[str, IO[str]] = {}
        for document in read_documents(inputs):
            text = document["text"]
            if not text.strip():
                continue
            language, was_identified = language_of(document, identify)
            if language not in files:
                files[language] = stack.enter_context(open(work / f"{language}.jsonl", "w", encoding="utf-8"))
            name = identity(document)
            files[language].write(json.dumps({"id": name, "text": text}) + "\n")
            table = tables.setdefault(language, LanguageTable())
            table.documents += 1
            table.identified += was_identified
            table.bytes += len(text.encode())
            if is_held_out(name, fraction):
                table.held_out += 1
            else:
                characters.update(text)
    if not tables:
        raise DataError(f"{', '.join(inputs)}: no text; each line must be one object with a `text`")
    return tables, characters


# ------------------------------------------------------------------------------------------------- tokens


def _train_tokenizer(
    work: Path,
    out: Path,
    languages: list[str],
    characters: Counter[str],
    vocab_size: int,
    fraction: float,
    log: Callable[[str], None],
) -> int:
    """Train on the training documents alone; a vocabulary that the text cannot fill is made smaller."""

    def documents() -> Iterator[tuple[str, str]]:
        for language in languages:
            for document in read_documents([str(work / f"{language}.jsonl")]):
                if not is_held_out(document["id"], fraction):
                    yield language, document["text"]

    coverage = character_coverage(characters, vocab_size)
    model = str(out / "tokenizer.model")
    try:
        train_sentencepiece(
            balance_languages(documents, ALPHA, TOKENIZER_BYTES), model, vocab_size, character_coverage=coverage
        )
    except VocabularyTooLarge as error:
        log(f"the text fills no vocabulary of {vocab_size}: the tokenizer has {error.largest} pieces")
        vocab_size = error.largest
        train_sentencepiece(
            balance_languages(documents, ALPHA, TOKENIZER_BYTES), model, vocab_size, character_coverage=coverage
        )
    return vocab_size


def _write_tokens(work: Path, out: Path, tables: dict[str, LanguageTable], fraction: float) -> None:
    for language, table in tables.items():
        summary = preprocess(
            [str(work / f"{language}.jsonl")],
            str(out / language),
            "SentencePieceTokenizer",
            str(out / "tokenizer.model"),
            append_eod=True,
            valid_fraction=fraction,
            log_interval=0,
        )
        table.tokens = summary.tokens + summary.held_out_tokens
        table.held_out_tokens = summary.held_out_tokens


def _print_table(tables: dict[str, LanguageTable], log: Callable[[str], None]) -> None:
    log(f"{'language':<10}{'documents':>10}{'held out':>10}{'bytes':>12}{'tokens':>12}{'bytes/token':>13}")
    total = LanguageTable()
    for name, t in sorted(tables.items()):
        log(f"{name:<10}{t.documents:>10}{t.held_out:>10}{t.bytes:>12}{t.tokens:>12}{t.bytes / t.tokens:>13.2f}")
        total.documents += t.documents
        total.held_out += t.held_out
        total.bytes += t.bytes
        total.tokens += t.tokens
    t = total
    log(f"{'all':<10}{t.documents:>10}{t.held_out:>10}{t.bytes:>12}{t.tokens:>12}{t.bytes / t.tokens:>13.2f}")
    if identified := sum(table.identified for table in tables.values()):
        log(f"the language of {identified} documents without a usable `lang` was identified")


# ------------------------------------------------------------------------------------------------- config


def make_config(
    data_root: str,
    tables: dict[str, LanguageTable],
    seq_length: int,
    global_batch_size: int,
    log: Callable[[str], None] = print,
) -> str:
    """YAML over preset `tiny` for this text: sources, and stages whose budgets read no source more than about 4 times.

    Sources that are shorter than one sequence are left out. Raises DataError where none is left.
    """
    usable = {name: (table.train_tokens - 1) // seq_length * seq_length for name, table in sorted(tables.items())}
    for name in [name for name, tokens in usable.items() if tokens <= 0]:
        log(f"{name}: not in config.yaml, as {tables[name].train_tokens} tokens fill no sequence of {seq_length}")
        del usable[name]
    if not usable:
        raise DataError(f"too little text: no language fills one sequence of {seq_length} tokens; give more text")
    english = usable.get("en", 0)
    others = sum(usable.values()) - english
    limit = min(MOST_TOKENS, MOST_EPOCHS * (english + others))
    is_staged = bool(english and others)
    if is_staged:
        share = sum(part * non_english for _, part, non_english in STAGES)
        limit = min(limit, int(MOST_EPOCHS * english / (1 - share)), int(MOST_EPOCHS * others / share))
    step_tokens = global_batch_size * seq_length
    steps = max(limit // step_tokens, len(STAGES))
    stages: list[dict[str, Any]]
    if is_staged:
        last = max(1, round(steps * STAGES[1][1]))
        stages = [
            {"name": name, "tokens": n * step_tokens, "non_english_share": share}
            for (name, _, share), n in zip(STAGES, (steps - last, last), strict=True)
        ]
    else:
        log(f"the text has {'only' if english else 'no'} English: one stage, each source weighted by its tokens")
        stages = [{"name": "stage1", "tokens": steps * step_tokens, "weights": usable}]
    config = {
        "preset": "tiny",
        "data": {
            "data_root": data_root,
            "sources": [{"name": name, "language": name, "weight": tokens} for name, tokens in usable.items()],
        },
        "curriculum": {"stages": stages},
        "logging": {"run_dir": f"runs/{Path(data_root).resolve().name}"},  # not the preset's own run
    }
    head = (
        "# Written by tools/prepare_corpus.py. A source's weight is its tokens, so that all are read equally often.\n"
    )
    return head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
