"""Many texts to ids at once, by the library that a tokenizer comes with or by a faster one that gives equal ids.

gigatoken (https://github.com/marcelroed/gigatoken) remembers the ids of every word it has met: `GigatokenEncoder`
bounds that memory, and is taken only where its ids equal the library's on hard cases and on a sample of the text.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megapoly.errors import TokenizerError
from megapoly.tokenizer.load import BORDER, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

BACKENDS = ("auto", "tokenizers", "sentencepiece", "gigatoken")
# Memory by which a process may grow before the words it remembers are dropped, and how often that is looked at.
CACHE_BYTES = 128 << 20
CHECK_BYTES = 4 << 20
SPOT_CHECK_CHARACTERS = 1000
LONG_CHARACTERS = 1 << 18
PROBES = (
    "", " ", "   leading and trailing   ", "\n", "a\n\n\nb", "tab\tand\r\nline", "\x00NUL\x00", "A" * 300,
    " " * 50 + "x", "don't won't I'LL we're", "3.14159 1,000,000 ٣٤٥ १२३ ²³ ½", "안녕하세요, 세상! 각각",
    "日本語と中文混在。「括弧」", "ภาษาไทยไม่มีช่องว่าง", "مرحبا بالعالم", "שלום עולם", "Привет, мир", "Việt Nam e\u0301 é",
    "ﬁ ﬀ ①", "👩\u200d👩\u200d👧🇰🇷👍🏽", "\u200bzero\u200dwidth\ufeff", "\u00a0nbsp\u3000wide",
    "▁underscore▁", "<0x41> [UNK] <|x|>", "\ufffd\U0010ffff", "def f(x):\n    return x  # code\n\n\tif (a<=b){c++;}",
    "https://a.b/c?d=e&f=%20",
)  # fmt: skip
Ids = tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]


class Encoder(Protocol):
    """Texts to ids without special tokens."""

    name: str

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Ids:
        """The ids of all texts back to back, and the length of each; `utf8` are the same texts as bytes."""


class LibraryEncoder:
    """The tokenizer's own library, one text after the other on one core.

    A library takes up to a hundred times the memory of a text, so a long one goes to it in pieces, cut at
    BORDER: no splitting into words that is in use joins what stands there. Whole go the texts of a tokenizer that may
    join it, or that gives other ids for pieces of PROBES than for the whole (one that begins each text with a space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizers"
        self._tokenizer = tokenizer
        self._encode = tokenizer.encode
        if isinstance(tokenizer, HuggingFaceTokenizer):
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads for one text would only be started
            self._encode = tokenizer.encode_quickly

    @cached_property
    def _cuts_long_texts(self) -> bool:
        return _can_be_cut(self._tokenizer)  # goes through the whole vocabulary: no work for every start

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Ids:
        # An array for each text: a list of Python's numbers takes ten times the memory.
        return _join([self._ids(text) for text in texts], np.int32)

    def _ids(self, text: str) -> npt.NDArray[np.int32]:
        if len(text) <= LONG_CHARACTERS or not self._cuts_long_texts:
            return np.array(self._encode(text), dtype=np.int32)
        return np.concatenate(
            [np.array(self._encode(piece), dtype=np.int32) for piece in pieces_of(text, LONG_CHARACTERS)]
        )


def pieces_of(text: str, characters: int) -> Iterator[str]:
    """A text in pieces of at least so many characters, cut at BORDER."""
    begin = 0
    while found := BORDER.search(text, begin + characters):
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]


def _can_be_cut(tokenizer: Tokenizer) -> bool:
    if not tokenizer.keeps_words_apart():
        return False
    joined = "".join(f"a{probe}b{border}" for probe, border in zip(PROBES, cycle("\n ，。、"), strict=False))
    return [i for piece in pieces_of(joined, 1) for i in tokenizer.encode(piece)] == tokenizer.encode(joined)


class GigatokenEncoder:
    """gigatoken on one core; texts with one of `unlike`, which it reads otherwise, go to the tokenizer's own library.

    Raises TokenizerError where it cannot read the tokenizer.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, unlike: Sequence[str] = ()) -> None:
        self.unlike = tuple(unlike)
        self._tokenizer = tokenizer
        self._library = LibraryEncoder(tokenizer)
        self._json = _tokenizer_json(tokenizer)
        self._load()

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        try:
            self._backend: Any = load_hf_json(self._json)
        except Exception as error:  # bare exceptions of several kinds, as of the library of `tokenizers`
            reason = " ".join(str(error).split())[:120]
            raise TokenizerError(f"{self._tokenizer.path}: gigatoken cannot read it ({reason})") from None
        self._encoded, self._looked_at, self._resident_at_first = 0, 0, 0

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Ids:
        self._forget()
        self._encoded += sum(map(len, utf8))
        # Not encode_batch: its answer needs awkward, which imports all of pyarrow where that is installed.
        found = [self._backend.encode(text) for text in utf8]
        for i, text in enumerate(texts) if self.unlike else ():
            if any(word in text for word in self.unlike):
                found[i] = self._library.encode([text], [utf8[i]])[0]
        return _join(found, np.uint32)

    def _forget(self) -> None:
        """Begin with an empty memory of words where the process has grown by CACHE_BYTES."""
        if self._encoded - self._looked_at < CHECK_BYTES:
            return
        self._looked_at = self._encoded
        resident = _resident_bytes()
        if not self._resident_at_first:
            self._resident_at_first = resident
        elif resident - self._resident_at_first > CACHE_BYTES:
            self._backend = None
            self._load()


def make_encoder(name: str, tokenizer: Tokenizer, unlike: Sequence[str] = ()) -> Encoder:
    """The encoder that `choose_backend` has named."""
    return GigatokenEncoder(tokenizer, unlike) if name == "gigatoken" else LibraryEncoder(tokenizer)


def choose_backend(backend: str, tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[str, tuple[str, ...], str]:
    """(name, texts that gigatoken reads otherwise, why not gigatoken) for one of BACKENDS.

    `auto` is gigatoken where it is installed and gives the library's ids for PROBES and the sample. Raises
    TokenizerError where what was asked for by name is not installed, is of another type, or gives other ids.
    """
    own = LibraryEncoder(tokenizer).name
    if backend not in BACKENDS:
        raise TokenizerError(f"tokenizer_backend '{backend}' is unknown; known: {', '.join(BACKENDS)}")
    if backend == own:
        return own, (), ""
    if backend not in ("auto", "gigatoken"):
        raise TokenizerError(f"tokenizer_backend {backend} cannot read a {tokenizer.tokenizer_type}; give {own}")
    why = _why_not(tokenizer, sample)
    if isinstance(why, tuple):
        return "gigatoken", why, ""
    if backend == "gigatoken":
        raise TokenizerError(f"tokenizer_backend gigatoken: {why}; give {own}")
    return own, (), why


def spot_check(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str], ids: Ids) -> None:
    """Raise TokenizerError where the ids of the first short text are not those of the tokenizer's own library."""
    if encoder.name != "gigatoken":
        return
    i = next((i for i, text in enumerate(texts) if 0 < len(text) <= SPOT_CHECK_CHARACTERS), None)
    if i is None:
        return
    begin = int(ids[1][:i].sum())
    if ids[0][begin : begin + int(ids[1][i])].tolist() != tokenizer.encode(texts[i]):
        own = LibraryEncoder(tokenizer).name
        raise TokenizerError(f"gigatoken gives other ids than {own} for {texts[i][:60]!r}; give {own} as backend")


def _join(parts: Sequence[npt.NDArray[np.integer]], dtype: type[np.integer]) -> Ids:
    lengths = np.array([len(ids) for ids in parts], dtype=np.int64)
    return (np.concatenate(parts) if parts else np.empty(0, dtype)), lengths


def _why_not(tokenizer: Tokenizer, sample: Sequence[str]) -> str | tuple[str, ...]:
    """Why gigatoken cannot serve; where it can, the special tokens that it reads otherwise when a text spells them."""
    if importlib.util.find_spec("gigatoken") is None:
        return "it is not installed (pip install 'megapoly[fast]')"
    try:
        encoder = GigatokenEncoder(tokenizer)
    except TokenizerError as error:
        return str(error)
    specials = _special_tokens(tokenizer)
    spelled = [f"a {token} b" for token in specials] + [f"{token}{token}" for token in specials]
    unlike = _differing(encoder, tokenizer, spelled)
    encoder.unlike = tuple(token for token in specials if any(token in text for text in unlike))
    wrong = _differing(encoder, tokenizer, [*PROBES, *sample])
    if wrong:
        return f"it gives other ids than {LibraryEncoder(tokenizer).name}, for {wrong[0][:40]!r} among others"
    return encoder.unlike


def _differing(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    ids, lengths = encoder.encode(texts, [text.encode() for text in texts])
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []
    return [text for text, part in zip(texts, parts, strict=True) if part.tolist() != tokenizer.encode(text)]


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.symbols()
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer.added_tokens()


def _tokenizer_json(tokenizer: Tokenizer) -> bytes | str:
    """The tokenizer as tokenizer.json, the one format that gigatoken itself reads."""
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

            found: str | bytes = sentencepiece_to_tokenizer_json(Path(tokenizer.path).read_bytes())
            return found
        path = Path(tokenizer.path)
        return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
    except Exception as error:  # gigatoken's reader of SentencePiece raises what it likes
        reason = " ".join(str(error).split())[:120]
        raise TokenizerError(f"{tokenizer.path}: gigatoken cannot read it ({reason})") from None


def _resident_bytes() -> int:
    """Memory of this process that is resident; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
