"""A user's own models as rules: KenLM's perplexity and a fastText classifier, each for one language."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapoly.data.clean.quality import Verdict
from megapoly.data.clean.settings import FasttextModel, KenlmModel, Settings
from megapoly.errors import DataError


class ModelRules:
    """Loads the models that the settings name; raises DataError for a missing package or a file that is no model."""

    def __init__(self, settings: Settings) -> None:
        self._rules: dict[str, list[Callable[[str], Verdict | None]]] = {}
        for language, kenlm in settings.kenlm.items():
            self._rules.setdefault(language, []).append(_perplexity_rule(language, kenlm))
        for language, fasttext in settings.fasttext.items():
            self._rules.setdefault(language, []).append(_classifier_rule(language, fasttext))

    def __call__(self, text: str, language: str) -> Verdict | None:
        """What the models of a language have against a text."""
        return next((verdict for rule in self._rules.get(language, ()) if (verdict := rule(text))), None)


def _perplexity_rule(language: str, wanted: KenlmModel) -> Callable[[str], Verdict | None]:
    try:
        import kenlm
    except ImportError:
        raise DataError(f"kenlm.{language} needs the package kenlm; pip install kenlm") from None
    model = _load(f"kenlm.{language}", wanted.model, kenlm.Model)

    def judge(text: str) -> Verdict | None:
        lines = [line for line in text.split("\n") if line.strip()]
        words = sum(len(line.split()) + 1 for line in lines)  # and the end of each line
        perplexity = 10 ** min(300.0, -sum(model.score(line) for line in lines) / max(1, words))
        if perplexity <= wanted.most_perplexity:
            return None
        return Verdict("perplexity", f"{perplexity:.4g} a word, over {wanted.most_perplexity:g}")

    return judge


def _classifier_rule(language: str, wanted: FasttextModel) -> Callable[[str], Verdict | None]:
    try:
        import fasttext
    except ImportError:
        raise DataError(f"fasttext.{language} needs the package fasttext; pip install fasttext-community") from None
    # Not load_model: it is a wrapper that some versions print a warning from.
    model = _load(f"fasttext.{language}", wanted.model, fasttext.FastText._FastText)
    if wanted.label not in model.get_labels():
        known = ", ".join(model.get_labels()[:8])
        raise DataError(f"{wanted.model}: has no label '{wanted.label}'; fasttext.{language}.label is one of {known}")

    def judge(text: str) -> Verdict | None:
        labels, shares = model.predict(" ".join(text.split()), k=-1)
        share = float(dict(zip(labels, shares, strict=True)).get(wanted.label, 0.0))
        if share >= wanted.least:
            return None
        return Verdict("classifier", f"{wanted.label} {share:.3f}, under {wanted.least:g}")

    return judge


def _load(key: str, path: str, load: Callable[[str], Any]) -> Any:
    if not Path(path).is_file():
        raise DataError(f"{path}: is no file; give {key}.model the path of one")
    try:
        return load(path)
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: cannot be loaded for {key} ({reason}); give a file of that library") from None
