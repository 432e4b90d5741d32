"""Write a megapoly checkpoint as a Hugging Face directory (GPT2LMHeadModel, GPTNeoXForCausalLM or LlamaForCausalLM)."""

from pathlib import Path
from typing import Any

from megapoly.arguments import ArgumentParser
from megapoly.checkpoint.load import CheckpointReader
from megapoly.errors import CheckpointError, MegapolyError, exit_on_error
from megapoly.hf.export import DTYPES, export


@exit_on_error
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, metavar="CKPT", help="a run, its checkpoints/ or one step's folder")
    parser.add_argument(
        "--save", required=True, metavar="DIR", help="directory to write; an earlier export is replaced"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the weights (default: the parameters' own)")
    parser.add_argument("--check", action="store_true", help="load the result with transformers and report on it")
    args = parser.parse_args()
    reader = CheckpointReader.open(args.load)
    folder = export(reader, args.save, args.dtype)
    print(f"step {reader.step} of {args.load} -> {folder}")
    if reader.tokenizer_path is None:
        print(f"no tokenizer was written: {reader.folder} holds none")
    if args.check:
        check(folder)


def check(folder: Path) -> None:
    """Load an export with transformers; CheckpointError where a weight or the tokenizer does not fit."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as error:
        raise MegapolyError(f"--check needs transformers ({error}); run: pip install 'transformers>=5'") from None
    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(f"{folder}: transformers reports {kind.replace('_', ' ')}: {sorted(info[kind])[:4]}")
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}")
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        print(f"{type(tokenizer).__name__}: {len(tokenizer):,} entries, end of text {tokenizer.eos_token_id}")


if __name__ == "__main__":
    main()
