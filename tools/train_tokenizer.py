"""Train a tokenizer: python tools/train_tokenizer.py --input A.jsonl --vocab-size 32000 --output tokenizer.model"""

import argparse
from collections.abc import Iterator

from megapoly.arguments import ArgumentParser
from megapoly.data.preprocess import read_documents
from megapoly.errors import ConfigError, TokenizerError, exit_on_error
from megapoly.pictures import checked_png
from megapoly.tokenizer import train
from megapoly.tokenizer.fertility import fertility, table, write_png
from megapoly.tokenizer.load import TOKENIZER_TYPES, Tokenizer, load_tokenizer

BYTE_LEVEL = ("split_digits", "nfc", "morpheme_separator")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Train a tokenizer and print what text costs in it, beside others.")
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="JSONL files, plain, .gz or .zst, or Parquet, with text and lang")
    add("--output", required=True, help="a .model, or for HuggingFaceTokenizer a .json or directory")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0])
    add("--vocab-size", type=int, required=True, help="pieces, bytes and special tokens included")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="of SentencePiece")
    add("--character-coverage", type=float, default=0.9995, help="of SentencePiece; rest is bytes")
    add("--special-tokens", nargs="+", default=[], help="further special tokens: <fim_prefix> <fim_middle> ..")
    add("--split-digits", action="store_true", help="byte-level BPE: every digit by itself (SentencePiece: always)")
    add("--nfc", action="store_true", help="byte-level BPE: bring text into Unicode's form C")
    add("--morpheme-separator", metavar="SIGN", help="byte-level BPE: no merge across this sign of the training text")
    add("--alpha", type=float, default=1.0, help="share of a language ~ bytes^alpha (XLM-R has 0.3)")
    add("--max-bytes", type=int, default=1 << 30, help="sample so much text at most")
    add("--evaluate", nargs="+", metavar="FILE", help="text to measure on (default: the input)")
    add("--compare", nargs="+", default=[], metavar="TYPE=PATH", help="other tokenizers to measure beside it")
    add("--png", type=checked_png, metavar="FILE", help="draw what is measured")
    return parser.parse_args()


def other(given: str) -> tuple[str, Tokenizer]:
    """A tokenizer to compare with, by its file."""
    kind, equals, path = given.partition("=")
    if not equals:
        raise ConfigError(f"--compare '{given}' must be TYPE=PATH; types: {', '.join(TOKENIZER_TYPES)}")
    return path, load_tokenizer(kind, path)


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    others = dict(other(given) for given in arguments.compare)
    options = {name: getattr(arguments, name) for name in BYTE_LEVEL}
    is_sentencepiece = arguments.tokenizer_type == TOKENIZER_TYPES[0]
    if is_sentencepiece:
        train.refuse_byte_level(options)

    def documents(paths: list[str]) -> Iterator[tuple[str, str]]:
        for document in read_documents(paths):
            yield str(document.get("lang", "und")), document["text"]

    texts = train.balance_languages(lambda: documents(arguments.input), arguments.alpha, arguments.max_bytes)
    special, size = arguments.special_tokens, arguments.vocab_size
    try:
        if is_sentencepiece:
            how = (arguments.model_type, arguments.character_coverage, special)
            train.train_sentencepiece(texts, arguments.output, size, *how)
        else:
            train.train_byte_level_bpe(texts, arguments.output, size, ("<|endoftext|>", *special), **options)
    except train.UnsuitableText as error:
        raise TokenizerError(f"{', '.join(arguments.input)}: {error}") from None
    trained = load_tokenizer(arguments.tokenizer_type, arguments.output)
    print(f"{arguments.output}: {trained.vocab_size} pieces, end of document {trained.eod}")
    text = arguments.evaluate or arguments.input
    all_of_them = {arguments.output: trained, **others}
    measured = {name: fertility(tokenizer, lambda: documents(text)) for name, tokenizer in all_of_them.items()}
    print(table(measured))
    if arguments.png is not None:
        write_png(measured, arguments.png)


if __name__ == "__main__":
    main()
