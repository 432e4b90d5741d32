"""A user's own models: what they find against a text removes it; without package, file or label it is one line."""

import math
import sys
from pathlib import Path

import pytest

from megapoly.data.clean.cleaner import Cleaner
from megapoly.data.clean.models import ModelRules
from megapoly.data.clean.settings import FasttextModel, KenlmModel, Settings, load_settings
from megapoly.errors import DataError

GOOD = "the ship came home in the morning and the crew was glad to see the harbour again after the long storm"
# A model of two words and one pair of them: log10 probabilities, and that of an unknown word.
ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-2.0\t<unk>\t0
0\t<s>\t0
-0.5\t</s>\t0
-0.5\tthe\t0
-1.0\tship\t0

\\2-grams:
-0.25\tthe ship

\\end\\
"""


def test_missing_packages_and_files_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, settings in (("kenlm", Settings(kenlm={"en": KenlmModel("m.arpa", 100)})),
                           ("fasttext", Settings(fasttext={"en": FasttextModel("m.bin")}))):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(DataError, match=f"{name}.en needs the package {name}; pip install"):
            ModelRules(settings)


def test_perplexity_of_kenlm_removes_what_is_over_the_limit(tmp_path: Path) -> None:
    pytest.importorskip("kenlm", reason="kenlm is not installed: pip install kenlm")
    path = tmp_path / "en.arpa"
    path.write_text(ARPA, encoding="utf-8")
    text = "the ship\nthe unheard"
    perplexity = 10 ** ((0.5 + 0.25 + 0.5 + 0.5 + 2.0 + 0.5) / 6)
    for limit, expected in ((perplexity * 1.001, None), (perplexity * 0.999, "perplexity")):
        verdict = ModelRules(Settings(kenlm={"en": KenlmModel(str(path), limit)}))(text, "en")
        assert (verdict.rule if verdict else None) == expected
    assert ModelRules(Settings(kenlm={"en": KenlmModel(str(path), 1)}))(text, "ko") is None
    (tmp_path / "config.yaml").write_text(f"kenlm: {{en: {{model: {path}, most_perplexity: 2}}}}", encoding="utf-8")
    outcome = Cleaner(load_settings(str(tmp_path / "config.yaml")))(GOOD, "en")
    assert (
        outcome.verdict is not None
        and outcome.verdict.rule == "perplexity"
        and math.isfinite(float(outcome.verdict.detail.split()[0]))
    )
    path.write_text("no model", encoding="utf-8")
    for wrong in (path, tmp_path / "none.arpa"):
        with pytest.raises(DataError, match=wrong.name):
            ModelRules(Settings(kenlm={"en": KenlmModel(str(wrong), 100)}))


def test_a_classifier_of_fasttext_removes_what_it_doubts(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext", reason="fasttext is not installed: pip install fasttext-community")
    lines = [f"__label__good {GOOD}", "__label__bad buy cheap pills now click here win money fast"] * 50
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), dim=10, epoch=20, thread=1, verbose=0)
    path = str(tmp_path / "en.bin")
    model.save_model(path)
    rules = ModelRules(Settings(fasttext={"en": FasttextModel(path)}))
    verdict = rules("click here\nto buy cheap pills", "en")
    assert verdict is not None and verdict.rule == "classifier" and verdict.detail.startswith("__label__good 0.")
    assert rules(GOOD, "en") is None and rules("buy cheap pills", "ko") is None
    with pytest.raises(DataError, match="no label '__label__fine'; fasttext.en.label is one of __label__"):
        ModelRules(Settings(fasttext={"en": FasttextModel(path, "__label__fine")}))
    (tmp_path / "wrong.bin").write_bytes(b"no model")
    with pytest.raises(DataError, match="wrong.bin: cannot be loaded"):
        ModelRules(Settings(fasttext={"en": FasttextModel(str(tmp_path / "wrong.bin"))}))
