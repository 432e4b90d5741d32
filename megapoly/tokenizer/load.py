"""One interface to SentencePiece and Hugging Face tokenizers, read from files alone."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from megapoly.errors import TokenizerError
from megapoly.files import read_small

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
EOD_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
MOST_BYTES = 1 << 28  # of a file: real ones have some ten MB
MOST_HOLES = 64  # ids to an entry of the vocabulary: real ones leave few out
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
PROBE, TRIED_IDS = "probe \U0001f600 1", 2048
# Between a letter and a space, a line's end, an ideographic comma or full stop.
BORDER = re.compile(r"(?<=[^\W\d_])(?=[ \n，。、])")
_SPACED = re.compile("[^ĠĊ](Ġ|Ċ|ãĢ|ï¼)")  # the bytes of BORDER's characters as byte-level vocabularies spell them


class Tokenizer(Protocol):
    """What the rest of megapoly asks of a tokenizer: ids without special tokens, and the id that ends a document."""

    tokenizer_type: str
    path: str
    vocab_size: int
    eod: int
    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens of SentencePiece have none."""

    def token_id(self, token: str) -> int | None:
        """The id of an entry of the vocabulary by its name."""

    def keeps_words_apart(self) -> bool:
        """Whether the ids on one side of BORDER do not depend on the text of the other side."""


class SentencePieceTokenizer:
    """A SentencePiece `.model` (PolyLM, LLaMA 1 and 2). Control symbols spelled out in a text are plain text.

    Raises TokenizerError where the file is missing, damaged or without an end-of-document piece.
    """

    tokenizer_type = "SentencePieceTokenizer"

    def __init__(self, path: str) -> None:
        self.path = path
        proto = _read(Path(path))
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._processor.encode("probe")  # an empty file parses as a model and fails only here
            self.vocab_size: int = self._processor.get_piece_size()
            self._processor.id_to_piece(list(range(self.vocab_size)))  # fails for a piece that is no UTF-8
            pieces = {name: self._processor.piece_to_id(name) for name in (*EOD_NAMES, *BOS_NAMES)}
            known = {name: id for name, id in pieces.items() if self._processor.id_to_piece(id) == name}
        except (RuntimeError, ValueError, IndexError):
            other = "; it is JSON: give tokenizer_type HuggingFaceTokenizer" if proto.lstrip()[:1] == b"{" else ""
            raise TokenizerError(f"{path}: no SentencePiece model or damaged{other or '; copy it again'}") from None
        self.eod = _eod(path, self._processor.eos_id(), known)
        bos = self._processor.bos_id()
        self.bos: int | None = bos if bos >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_id(self, token: str) -> int | None:
        found: int = self._processor.piece_to_id(token)  # that of the unknown piece where there is none
        return found if self._processor.id_to_piece(found) == token else None

    def keeps_words_apart(self) -> bool:
        """Whether it is a BPE, whose scores are the ranks of its merges, without a piece that reaches over BORDER."""
        p = self._processor
        no_text = (p.is_control, p.is_unknown, p.is_byte)
        pieces = [i for i in range(self.vocab_size) if not any(is_kind(i) for is_kind in no_text)]
        is_bpe = all(p.get_score(i) == round(p.get_score(i)) for i in pieces)
        return is_bpe and not any(BORDER.search(p.id_to_piece(i).replace("\u2581", " ")) for i in pieces)

    def symbols(self) -> list[str]:
        """The pieces that stand for no text: control symbols and the unknown piece."""
        p = self._processor
        return [p.id_to_piece(i) for i in range(self.vocab_size) if p.is_control(i) or p.is_unknown(i)]


class HuggingFaceTokenizer:
    """A `tokenizer.json`, or a directory that has one, through the `tokenizers` library; no code is taken from it.

    `eod` and `bos` are the eos_token and bos_token of tokenizer_config.json or special_tokens_map.json beside it, else
    the usual names. As in `transformers`, a special token that is spelled out in a text becomes its id.
    """

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, path: str) -> None:
        self.path = path
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        content = _read(file)
        try:
            # In a thread, which has memory of its own: what loading leaves there in small holes, encoding does not get.
            with ThreadPoolExecutor(1) as thread:
                self._tokenizer = thread.submit(_load_and_try, content).result()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception, ValueError, and the library's panics, which are no Exception
            hint = "give tokenizer_type SentencePieceTokenizer" if file.suffix == ".model" else "copy it again"
            reason = " ".join(str(error).split())[:120]
            raise TokenizerError(f"{file}: no tokenizer.json or damaged ({reason}); {hint}") from None
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise TokenizerError(f"{file}: has an empty vocabulary; copy it again")
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > MOST_HOLES * len(vocab):  # a model would have a row for each id
            last = max(vocab, key=lambda name: vocab[name])
            raise TokenizerError(
                f"{file}: has {len(vocab)} entries and the id {self.vocab_size - 1} ({ascii(last)[:40]}); copy it again"
            )
        special = _special_tokens(file.parent)
        self.eod = _eod(path, vocab.get(special.get("eos_token", ""), -1), vocab)
        named = [special["bos_token"]] if "bos_token" in special else BOS_NAMES
        self.bos = next((vocab[name] for name in named if name in vocab), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_quickly(self, text: str) -> list[int]:
        """The same ids, by a call of the library that leaves out where in the text each token stands."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def added_tokens(self) -> list[str]:
        """Special and other added tokens, which are found in a text before it is split."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def keeps_words_apart(self) -> bool:
        """Whether it is a byte-level BPE that splits a text into words, without entries that reach over BORDER.

        (A unigram model adds up the scores of a whole text, whose rounding the text before would change.)
        """
        splits = repr(self._tokenizer.pre_tokenizer)
        is_split = "ByteLevel(" in splits and ("use_regex=True" in splits or "Split(" in splits)
        if not is_split or not isinstance(self._tokenizer.model, tokenizers.models.BPE):
            return False
        added = self._tokenizer.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip or BORDER.search(token.content) for token in added):
            return False
        to_text = tokenizers.decoders.ByteLevel().decode
        spaced = (entry for entry in self._tokenizer.get_vocab(with_added_tokens=False) if _SPACED.search(entry))
        return not any(BORDER.search(to_text([entry])) for entry in spaced)

    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the file's template sets before and after a text, e.g. the BOS of Llama.

        Raises TokenizerError for a template that does more than that.
        """
        inner, whole = self.encode("a b"), self._tokenizer.encode("a b").ids
        for i in range(len(whole) - len(inner) + 1):
            if inner and whole[i : i + len(inner)] == inner:
                return whole[:i], whole[i + len(inner) :]
        raise TokenizerError(f"{self.path}: its template does more than add special tokens before and after a text")


def load_tokenizer(tokenizer_type: str, tokenizer_model: str) -> Tokenizer:
    """Load SentencePieceTokenizer (a `.model`) or HuggingFaceTokenizer (`tokenizer.json` or its directory).

    Raises TokenizerError for an unknown type, and for a file that is missing, damaged or of the other type.
    """
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(tokenizer_model)
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(tokenizer_model)
    raise TokenizerError(f"tokenizer_type '{tokenizer_type}' is unknown; known: {', '.join(TOKENIZER_TYPES)}")


def _load_and_try(content: bytes) -> tokenizers.Tokenizer:
    """A tokenizer that has encoded a text and decoded ids: parts that can do neither load like others."""
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # Files of sentence encoders carry truncation, which would silently cut documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for has_special in (False, True):
        tokenizer.encode(PROBE, add_special_tokens=has_special)
    tokenizer.decode(list(range(min(tokenizer.get_vocab_size(), TRIED_IDS))), skip_special_tokens=False)
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return read_small(path, MOST_BYTES)
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such tokenizer file; set tokenizer_model") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}; set tokenizer_model to a file") from None


def _special_tokens(directory: Path) -> dict[str, str]:
    """Names of special tokens (`eos_token`, ..) from the files that `transformers` writes beside a tokenizer.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            entries: Any = json.loads(_read(path))
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}: not valid JSON ({error}); copy it again") from None
        for key, value in entries.items() if isinstance(entries, dict) else ():
            token = value.get("content") if isinstance(value, dict) else value
            if key in ("eos_token", "bos_token") and isinstance(token, str):
                found[key] = token
    return found


def _eod(path: str, eos: int, vocab: dict[str, int]) -> int:
    if eos >= 0:
        return eos
    for name in EOD_NAMES:
        if name in vocab:
            return vocab[name]
    raise TokenizerError(f"{path}: has no end-of-document token; it needs an eos_token or one of {' '.join(EOD_NAMES)}")
