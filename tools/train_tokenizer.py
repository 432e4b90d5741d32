"""Train a tokenizer: python tools/train_tokenizer.py --input A.jsonl --vocab-size 32000 --output tokenizer.model"""

import argparse
from collections.abc import Iterator

from megapoly.arguments import ArgumentParser
from megapoly.data.preprocess import read_documents
from megapoly.errors import TokenizerError, exit_on_error
from megapoly.tokenizer.load import TOKENIZER_TYPES, load_tokenizer
from megapoly.tokenizer.train import (
    UnsuitableText,
    balance_languages,
    bytes_per_token,
    train_byte_level_bpe,
    train_sentencepiece,
)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Train a tokenizer and print its bytes per token by language.")
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files, plain, .gz or .zst, with text and lang")
    parser.add_argument("--output", required=True, help="a .model, or for HuggingFaceTokenizer a .json or directory")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0])
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, bytes and special tokens included")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="of SentencePiece")
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="of SentencePiece; rest is bytes")
    parser.add_argument("--alpha", type=float, default=1.0, help="share of a language ~ bytes^alpha (XLM-R has 0.3)")
    parser.add_argument("--max-bytes", type=int, default=1 << 30, help="sample so much text at most")
    return parser.parse_args()


@exit_on_error
def main() -> None:
    arguments = parse_arguments()

    def documents() -> Iterator[tuple[str, str]]:
        for document in read_documents(arguments.input):
            yield str(document.get("lang", "all")), document["text"]

    texts = balance_languages(documents, arguments.alpha, arguments.max_bytes)
    try:
        if arguments.tokenizer_type == "SentencePieceTokenizer":
            coverage = arguments.character_coverage
            train_sentencepiece(texts, arguments.output, arguments.vocab_size, arguments.model_type, coverage)
        else:
            train_byte_level_bpe(texts, arguments.output, arguments.vocab_size)
    except UnsuitableText as error:
        raise TokenizerError(f"{', '.join(arguments.input)}: {error}") from None
    tokenizer = load_tokenizer(arguments.tokenizer_type, arguments.output)
    print(f"{arguments.output}: {tokenizer.vocab_size} pieces, end of document {tokenizer.eod}")
    for language, ratio in bytes_per_token(tokenizer, documents()).items():
        print(f"{language:<8} {ratio:.2f} bytes per token")


if __name__ == "__main__":
    main()
