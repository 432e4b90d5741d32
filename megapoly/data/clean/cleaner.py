"""One document through all of cleaning that needs no other document: mended, its language found, judged."""

from collections import Counter
from dataclasses import dataclass, field

from megapoly.data.clean.fixes import TextFixer, Unsettled, fix_newlines
from megapoly.data.clean.language import LanguageFinder
from megapoly.data.clean.models import ModelRules
from megapoly.data.clean.personal_data import PersonalData
from megapoly.data.clean.quality import Verdict, judge
from megapoly.data.clean.settings import CODE, Settings


@dataclass
class Outcome:
    """A document's mended text and language, what was mended, and the rule that removes it, if any."""

    text: str
    language: str
    mended: Counter[str] = field(default_factory=Counter)
    verdict: Verdict | None = None


class Cleaner:
    """Cleans documents by settings; raises ConfigError or DataError for languages and models that cannot be used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fix = TextFixer(settings.fixes)
        self._replace = PersonalData(settings.personal_data)
        self._find_language = LanguageFinder(settings.languages)
        self._judge_by_model = ModelRules(settings)

    def __call__(self, text: str, given: str, kind: str = "text") -> Outcome:
        """What becomes of a document that names the language `given` (und if none) and is of `kind` (code or other)."""
        outcome = Outcome(text, CODE if kind == CODE or given == CODE else given)
        if outcome.language == CODE:
            outcome.text = self._replace(fix_newlines(text), CODE, outcome.mended)
            if not outcome.text.strip():
                outcome.verdict = Verdict("empty", "nothing but spaces")
            return outcome
        try:
            outcome.text = self._fix(text, given, outcome.mended)
        except Unsettled:
            outcome.verdict = Verdict("endless markup", "mending it does not end")
            return outcome
        if not outcome.text.strip():
            outcome.verdict = Verdict("empty", "nothing but spaces is left after mending")
            return outcome
        found = self._find_language(outcome.text, given)
        outcome.language, outcome.verdict = found.language, found.verdict
        if outcome.verdict is None:
            rules = self._settings.rules_of(found.language)
            outcome.verdict = judge(outcome.text, rules) or self._judge_by_model(outcome.text, found.language)
        if outcome.verdict is None:
            outcome.text = self._replace(outcome.text, found.language, outcome.mended)
        return outcome
