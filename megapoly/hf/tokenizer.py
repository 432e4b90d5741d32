"""Tokenizer files of an export: what `transformers.AutoTokenizer` needs to give the ids that training saw.

A SentencePiece model is rewritten as a `tokenizer.json`. Its BPE merges are not in the file: SentencePiece joins the
adjacent pair whose concatenation is the piece of the highest score, so every split of a piece into two is a merge
of that piece's rank.
"""

import json
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megapoly.errors import TokenizerError
from megapoly.tokenizer.load import Tokenizer

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "\u2581"
_COPIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")


@dataclass
class SentencePieceModel:
    """What a `.model` file says; the defaults are those of sentencepiece_model.proto."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    whitespace_suffix: bool = False
    unk_id: int = 0
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def write_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int, max_length: int) -> None:
    """Write the files from which `AutoTokenizer` gives the ids of `tokenizer`, at most `max_length` tokens long.

    A SentencePiece model becomes a tokenizer.json with itself beside; a Hugging Face one is copied. As everywhere in
    `transformers`, a special token that is spelled out in a text becomes its id. Raises TokenizerError for more entries
    than the model has rows, and for a feature that `tokenizers` cannot reproduce.
    """
    source = Path(tokenizer.path)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{source}: {tokenizer.vocab_size} entries exceed the model's vocabulary of {vocab_size}: "
            "give the tokenizer that the run was trained with"
        )
    config: dict[str, Any]
    if tokenizer.tokenizer_type == "SentencePieceTokenizer":
        model = read_sentencepiece(source)
        rewritten = sentencepiece_to_tokenizers(model, source)
        rewritten.save(str(folder / "tokenizer.json"))
        shutil.copyfile(source, folder / "tokenizer.model")
        config = {"unk_token": model.pieces[model.unk_id][0], "add_bos_token": False, "add_eos_token": False}
    else:
        rewritten, config = _copy_hugging_face(source, folder)
    config |= {"eos_token": rewritten.id_to_token(tokenizer.eod), "clean_up_tokenization_spaces": False}
    if tokenizer.bos is not None:
        config["bos_token"] = rewritten.id_to_token(tokenizer.bos)
    # Other classes rebuild parts of tokenizer.json by rules of their own.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _copy_hugging_face(source: Path, folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    origin = source if source.is_dir() else source.parent
    for name in _COPIED if source.is_dir() else ():
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
    beside = origin / "tokenizer_config.json"
    try:
        config = json.loads(beside.read_bytes()) if beside.is_file() else {}
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair can be read and not be written
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{beside}: not valid JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{beside}: must hold a JSON object; copy it again")
    config.pop("auto_map", None)  # would name Python code that is not exported
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config


# --------------------------------------------------------------------------------------------- SentencePiece


def sentencepiece_to_tokenizers(model: SentencePieceModel, source: Path) -> tokenizers.Tokenizer:
    """Build a `tokenizers.Tokenizer` with the ids of a SentencePiece BPE or unigram model.

    Exact for BPE without a table of characters (normalization identity). With one (nmt_nfkc), combining marks after
    a space may differ; with unigram, a byte piece spelled out in a text (`<0x0A>`).
    """
    if any(kind == _UNUSED for _, _, kind in model.pieces):
        raise TokenizerError(f"{source}: unused pieces cannot be expressed in tokenizer.json; retrain without them")
    if model.whitespace_suffix or not model.escape_whitespaces:
        raise TokenizerError(f"{source}: whitespace as suffix cannot be expressed in tokenizer.json")
    if model.model_type == _BPE:
        vocabulary = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                vocabulary,
                list(_merges(model)),
                unk_token=model.pieces[model.unk_id][0],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    elif model.model_type == _UNIGRAM:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
    else:
        raise TokenizerError(f"{source}: only BPE and unigram models can be exported")
    user_defined = [piece for piece, _, kind in model.pieces if kind == _USER_DEFINED]
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model, user_defined))
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in user_defined])
    return tokenizer


def _merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    scores = {piece: score for piece, score, kind in model.pieces if kind == _NORMAL}
    for piece in sorted(scores, key=lambda p: -scores[p]):
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]


def _normalizers(model: SentencePieceModel, user_defined: list[str]) -> list[Any]:
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        # Like normalizers.Prepend, but a user-defined symbol alone stays as it is: tokenizers normalises the symbols
        # themselves too, and one with a prefix would be found nowhere.
        symbols = "|".join(re.escape(piece) for piece in user_defined) or "(?!)"
        steps.append(normalizers.Replace(Regex(rf"\A(?=[\s\S])(?!(?:{symbols})\z)"), _SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the fields of a `.model` file that decide about ids.

    The file is parsed by hand: sentencepiece hides the normalizer's settings, and its protobuf classes need a protobuf
    runtime of the right generation. Raises TokenizerError where it is missing or damaged.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                model.pieces.append((piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
            elif number == 2:
                _read_trainer_spec(model, dict(_fields(value)))
            elif number == 3:
                spec = dict(_fields(value))
                model.charsmap = spec.get(2, b"")
                model.add_dummy_prefix = bool(spec.get(3, True))
                model.remove_extra_whitespaces = bool(spec.get(4, True))
                model.escape_whitespaces = bool(spec.get(5, True))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        raise TokenizerError(f"{path}: not a SentencePiece model") from None
    if not model.pieces or not 0 <= model.unk_id < len(model.pieces):
        raise TokenizerError(f"{path}: not a SentencePiece model (no pieces or no unknown piece)")
    return model


def _read_trainer_spec(model: SentencePieceModel, spec: dict[int, Any]) -> None:
    model.model_type = int(spec.get(3, _UNIGRAM))
    model.whitespace_suffix = bool(spec.get(24, False))
    model.byte_fallback = bool(spec.get(35, False))
    model.unk_id = int(spec.get(40, 0))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: integers for varints, bytes for all else."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else -1)
        if size < 0 or position + size > len(data):
            raise ValueError("truncated or unknown field")
        yield key >> 3, data[position : position + size]
        position += size
