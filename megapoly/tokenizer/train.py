"""Training tokenizers: SentencePiece as PolyLM has it, byte-level BPE as Polyglot-Ko has it, languages balanced."""

import contextlib
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megapoly.errors import ConfigError, TokenizerError

# SentencePiece silently skips a sentence with a tab or U+2585 (its own marks) and one over max_sentence_length. Cut
# at those and at line ends nothing is lost: such characters become byte pieces, <0x0A> for a newline as in LLaMA.
_CUTS = re.compile("[\t\n\r\0\u2585]")
_CHARACTERS_PER_SENTENCE = 4096
_META_PIECES = 3 + 256  # <unk>, <s>, </s> and the bytes
_CONTROL = ("<unk>", "<s>", "</s>")
_END_OF_TEXT = "<|endoftext|>"
MOST_PIECES = 10_000_000


class UnsuitableText(TokenizerError):
    """The text, rather than an option, is why there is no tokenizer."""


class VocabularyTooLarge(UnsuitableText):
    """The text has not enough to say for a vocabulary of the size asked for; `largest` is what it can fill."""

    def __init__(self, message: str, largest: int) -> None:
        super().__init__(message)
        self.largest = largest


def check_vocab_size(vocab_size: int, special_tokens: int = len(_CONTROL), characters: int = 1) -> None:
    """Refuse (TokenizerError) a size that no text could give."""
    least = 256 + special_tokens + characters
    if not least <= vocab_size <= MOST_PIECES:
        what = "bytes, special tokens and a character" if characters else "bytes and special tokens"
        raise TokenizerError(f"vocab_size ({vocab_size}) must lie between {least} ({what}) and {MOST_PIECES:,}")


def train_sentencepiece(
    texts: Iterable[str],
    model_path: str,
    vocab_size: int,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    special_tokens: Sequence[str] = (),
) -> None:
    """Train a SentencePiece model the way of PolyLM (arXiv 2307.06018): byte fallback, single digits, no normalisation.

    decode(encode(text)) == text for every text without U+2581, the mark for a space. `<unk>` is 0, `<s>` 1, `</s>` 2.
    No space is put before a text: so `transformers.LlamaTokenizer` with add_prefix_space=False gives equal ids (bpe).
    `special_tokens` follow as control symbols, which no text becomes.
    Equal texts give an equal file. Raises VocabularyTooLarge, or TokenizerError for an empty text.
    """
    if model_path.endswith(".json") or os.path.isdir(model_path):
        raise TokenizerError(
            f"{model_path}: a SentencePiece model is one file, such as {Path(model_path).stem}.model; give such a "
            "name, or --tokenizer-type HuggingFaceTokenizer for a .json or directory"
        )
    check_vocab_size(vocab_size, len(_CONTROL) + len(special_tokens))
    _check_special_tokens([*_CONTROL, *special_tokens])
    if model_type not in ("bpe", "unigram"):
        raise TokenizerError(f"model_type '{model_type}' is unknown; known: bpe, unigram")
    if not 0.98 <= character_coverage <= 1:
        raise TokenizerError(f"character_coverage ({character_coverage}) must lie in [0.98, 1]")
    source = _Source(_sentences(texts))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(source),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * _CHARACTERS_PER_SENTENCE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(special_tokens),
            num_threads=16,  # a part of the file: the machine's own count would change its bytes
            minloglevel=3,
        )
    except RuntimeError as error:
        source.reraise()
        raise _training_error(str(error), source.count, vocab_size) from None
    source.reraise()
    _write(Path(model_path), model.getvalue())


def train_byte_level_bpe(
    texts: Iterable[str], path: str, vocab_size: int, special_tokens: Sequence[str] = (_END_OF_TEXT,), *,
    split_digits: bool = False, nfc: bool = False, morpheme_separator: str | None = None,
) -> None:  # fmt: skip
    """Train a byte-level BPE as of GPT-2 and Polyglot-Ko; `special_tokens` take the first ids.

    `path` is a tokenizer.json, or a directory that then also gets tokenizer_config.json. Every text round-trips, with
    `nfc` in Unicode's form C. With `split_digits` every digit is a token of its own. `morpheme_separator` is a sign
    that an analyser has put between the morphemes of the training text: no merge is learnt across it, and text that
    is encoded later needs none (Polyglot-Ko, arXiv 2306.02254, with MeCab).
    Raises VocabularyTooLarge, or TokenizerError for an empty text.
    """
    if path.endswith(".model"):
        raise TokenizerError(
            f"{path}: byte-level BPE has no .model; give a .json or directory, "
            "or --tokenizer-type SentencePieceTokenizer"
        )
    check_vocab_size(vocab_size, len(special_tokens), characters=0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_special_tokens(special_tokens)
    if morpheme_separator is not None and len(morpheme_separator) != 1:
        raise TokenizerError(f"morpheme_separator '{morpheme_separator}' must be one character that the text lacks")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    at_run_time: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        at_run_time = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), at_run_time])
    tokenizer.pre_tokenizer = at_run_time
    if morpheme_separator is not None:
        separate = pre_tokenizers.Split(morpheme_separator, "removed")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([separate, at_run_time])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    source = _Source(texts)
    tokenizer.train_from_iterator(iter(source), trainer)
    source.reraise()
    if not source.count:
        raise UnsuitableText("there is no text to train a tokenizer on; check the input files")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size < vocab_size:
        raise _too_large(vocab_size, size)
    tokenizer.pre_tokenizer = at_run_time
    is_file = path.endswith(".json")
    _write(Path(path) if is_file else Path(path) / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    if not is_file:
        end = _END_OF_TEXT if _END_OF_TEXT in special_tokens else special_tokens[0]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "add_prefix_space": False}
        _write(Path(path) / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def refuse_byte_level(options: Mapping[str, object]) -> None:
    """Refuse (ConfigError) what a SentencePiece model cannot have.

    Form C among it: a model's own normalisation replaces what a finite table lists, each place once, while a sign
    composes with its letter past any number of signs of other classes (alef, kasra, hamza in vocalised Arabic).
    """
    wrong = ", ".join(f"--{name.replace('_', '-')}" for name, value in options.items() if value)
    if wrong:
        why = " (no table of a .model gives form C of all text: bring the text into it before)" * bool(options["nfc"])
        raise ConfigError(f"{wrong}: for byte-level BPE, give --tokenizer-type HuggingFaceTokenizer{why}")


def balance_languages(
    documents: Callable[[], Iterable[tuple[str, str]]], alpha: float = 0.5, max_bytes: int = 256 << 20
) -> Iterator[str]:
    """Texts of (language, text) documents, resampled so that language l has a share of bytes ~ (its bytes)^alpha.

    `documents` is called twice, to count and to yield. Small languages are repeated and, below `max_bytes` in all, no
    text is left out; the choice depends on the text alone. XLM-R (arXiv 1911.02116) has alpha 0.3; 1 changes nothing.
    Raises TokenizerError, once it is read from, for an alpha outside [0, 1] and for max_bytes below 1.
    """
    if not 0 <= alpha <= 1:
        raise TokenizerError(f"alpha ({alpha}) must lie in [0, 1]: 1 keeps the shares of the text, 0 makes them equal")
    if max_bytes < 1:
        raise TokenizerError(f"max_bytes ({max_bytes}) must be at least 1")
    sizes: Counter[str] = Counter()
    for language, text in documents():
        sizes[language] += len(text.encode(errors="replace"))
    repeats = {language: size ** (alpha - 1) for language, size in sizes.items() if size}
    if not repeats:
        return
    least = min(repeats.values())
    total = sum(sizes[language] * repeat / least for language, repeat in repeats.items())
    scale = min(1.0, max_bytes / total) / least
    for language, text in documents():
        if text:
            whole, part = divmod(repeats[language] * scale, 1.0)
            digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
            for _ in range(int(whole) + (int.from_bytes(digest) < part * 2**64)):
                yield text


def character_coverage(characters: Counter[str], vocab_size: int) -> float:
    """The largest share of characters, at most 0.9995, whose alphabet takes at most half of a vocabulary's free pieces.

    In a small vocabulary of many languages rare Han characters would else leave no room for words. SentencePiece takes
    nothing below 0.98.
    """
    room = max(1, (vocab_size - _META_PIECES) // 2)
    covered = sum(count for _, count in characters.most_common(room))
    total = sum(characters.values())
    return max(0.98, min(0.9995, covered / total)) if total else 0.9995


class _Source:
    """Counts texts and keeps the exception of an iterator that a trainer in C++ or Rust calls."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self._error: BaseException | None = None
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                self.count += 1
                yield text
        except Exception as error:
            self._error = error

    def reraise(self) -> None:
        if self._error is not None:
            raise self._error


def _check_special_tokens(tokens: Sequence[str]) -> None:
    for token in tokens:
        if not token.strip() or tokens.count(token) > 1:
            raise TokenizerError(f"special token '{token}' is empty, or given twice or by itself already")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _CUTS.split(text):
            for begin in range(0, len(line), _CHARACTERS_PER_SENTENCE):
                yield line[begin : begin + _CHARACTERS_PER_SENTENCE]


def _training_error(message: str, n_sentences: int, vocab_size: int) -> TokenizerError:
    """SentencePiece's own words (a file and line of C++) as one line with a way out."""
    if n_sentences == 0:
        return UnsuitableText("there is no text to train a tokenizer on; check the input files")
    if match := re.search(r"value <= (\d+)", message):
        return _too_large(vocab_size, int(match[1]))
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return TokenizerError(
            f"vocab_size ({vocab_size}) must be at least {match[1]}: bytes, special tokens and the characters of this "
            "text; a lower --character-coverage needs less"
        )
    return UnsuitableText(f"SentencePiece cannot train on this text: {' '.join(message.split())[:200]}")


def _too_large(vocab_size: int, largest: int) -> VocabularyTooLarge:
    return VocabularyTooLarge(
        f"vocab_size ({vocab_size}) is too large for this text; the largest possible is {largest}", largest
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TokenizerError(f"{path}: cannot be written: {error.strerror}") from None
