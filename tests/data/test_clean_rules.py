"""Quality, repetition, language and settings: what each rule removes, and that good text in every language passes."""

import dataclasses
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data.clean.cleaner import Cleaner
from megapoly.data.clean.language import LanguageFinder
from megapoly.data.clean.quality import judge
from megapoly.data.clean.repetition import repetition
from megapoly.data.clean.settings import LanguageChoice, Rules, load_settings
from megapoly.data.clean.units import prose_of, units_of
from megapoly.errors import ConfigError

SETTINGS = load_settings()
GOOD = {
    "en": "The old lighthouse keeper counted the ships while the fog came in. He had not seen a storm like that for years, and it made him think of his father, who used to sit on the same stairs and wait for the morning.",
    "de": "Der alte Leuchtturmwärter zählte die Schiffe, während der Nebel in den Hafen zog. Er hatte seit Jahren keinen solchen Sturm mehr gesehen und dachte an seinen Vater, der auf derselben Treppe saß.",
    "ko": "늙은 등대지기는 저녁 안개가 항구로 밀려오는 동안 지나가는 배를 세고 있었다. 그는 몇 해 동안 그런 폭풍을 본 적이 없었고, 같은 계단에 앉아 아침을 기다리던 아버지를 떠올렸다ㅋㅋ.",
    "ja": "年老いた灯台守は、夕方の霧が港に入ってくるあいだ、通り過ぎる船を数えていた。こんな嵐を何年も見たことがなく、同じ階段に座って朝を待っていた父のことを思い出した。",
    "zh": "老灯塔看守人数着来往的船只，傍晚的雾气正慢慢漫进港口。他已经很多年没有见过这样的暴风雨了，于是想起了自己的父亲，那时父亲总是坐在同一级台阶上等待天亮。",
    "th": "คนเฝ้าประภาคารชรานับเรือที่ผ่านไปขณะที่หมอกยามเย็นลอยเข้ามาในท่าเรือ เขาไม่ได้เห็นพายุแบบนี้มาหลายปีแล้ว และนึกถึงพ่อของเขาที่เคยนั่งรอเช้าบนบันไดขั้นเดียวกัน",
    "ar": "كان حارس المنارة العجوز يعد السفن بينما كان ضباب المساء يدخل إلى الميناء. لم ير عاصفة مثل هذه منذ سنوات، وتذكر والده الذي كان يجلس على الدرج نفسه في انتظار الصباح.",
    "he": "שומר המגדלור הזקן ספר את הספינות בזמן שהערפל נכנס אל הנמל. הוא לא ראה סערה כזאת כבר שנים רבות, והיא הזכירה לו את אביו, שהיה יושב על אותן מדרגות ומחכה לבוקר.",
    "ru": "Старый смотритель маяка считал корабли, пока вечерний туман накрывал гавань. Он не видел такой бури уже много лет и вспомнил отца, который сидел на той же лестнице и ждал утра.",
    "vi": "Người gác hải đăng già đếm những con tàu đi qua trong khi sương chiều tràn vào bến cảng. Ông đã không thấy một cơn bão như vậy trong nhiều năm và nhớ đến cha của mình.",
    "tr": "Yaşlı fener bekçisi, akşam sisi limana girerken geçen gemileri saydı. Yıllardır böyle bir fırtına görmemişti ve aynı merdivende oturup sabahı bekleyen babasını hatırladı, bu da ona iyi geldi.",
}  # fmt: skip


def rule(text: str, language: str = "en", **changed: object) -> str | None:
    verdict = judge(text, dataclasses.replace(SETTINGS.rules_of(language), **changed))
    return verdict.rule if verdict else None


@pytest.mark.parametrize("language", GOOD)
def test_good_prose_passes_and_is_known_with_and_without_its_language(language: str) -> None:
    clean = Cleaner(SETTINGS)
    for given_language in (language, "und", f"{language}-XX"):
        outcome = clean(GOOD[language], given_language)
        assert (outcome.verdict, outcome.language, outcome.text) == (None, language, GOOD[language])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Too short.", "too short"),
        ("x" * 1_000_001, "too long"),
        (GOOD["en"] + "\ufffd" * 3, "damaged text"),
        ("\n".join(f"- the point number {word} and more of it" for word in "one two three four five".split()), "bullet lines"),
        ("\n".join(f"The beginning of a story about {word}..." for word in "one two three".split()), "ellipsis lines"),
        ("# " * 20 + GOOD["en"], "symbols"),
        ("12 + 34 = 46 ; " * 10 + GOOD["en"][:60], "alphabetic words"),
        ("internationalization institutionalization compartmentalization misinterpretations", "word length"),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h", "word length"),
        ("abc123456 def123456 ghi123456 jkl123456 mno123456 pqr123456", "digits"),
        ("Lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et dolore "
         "magna aliqua ut enim ad minim veniam quis nostrud exercitation ullamco laboris nisi ut aliquip ex ea commodo "
         "consequat duis aute irure dolor", "stop words"),
    ],
)  # fmt: skip
def test_each_rule_removes_what_it_is_for(text: str, expected: str) -> None:
    assert rule(text) == expected


def test_scripts_and_spam() -> None:
    assert rule(GOOD["en"], "ko") == "script" and rule(GOOD["ko"] + GOOD["en"][:100], "ko") is None
    assert rule(GOOD["ko"] + " 카지노사이트 먹튀검증 바카라사이트", "ko") == "spam"
    assert rule(GOOD["ko"] + " 바카라사이트", "ko") is None  # mentioned, not advertised


def test_a_rule_is_off_at_zero() -> None:
    assert rule("# " * 30 + GOOD["en"], max_symbols_per_word=0, min_alphabetic_words=0) is None
    assert rule("Yes, sir", min_characters=0) is None


def test_fenced_code_is_judged_by_the_prose_around_it() -> None:
    code = "```\n" + "x[0] = 1234567890\n" * 60 + "```\n"
    assert rule(GOOD["en"] + "\n" + code) is None and rule(GOOD["en"] + "\n" + code.replace("`", "")) is not None
    assert prose_of("a\n```py\nx\n```\nb") == "a\nb" and prose_of("```\nx\n```") == "```\nx\n```"


# ------------------------------------------------------------------------------------------------ repetition


def plainly(units: list[str], rules: Rules) -> tuple[str, str] | None:
    """The measures of n-grams by definition, in plain Python."""
    total = sum(map(len, units))
    wanted = [(int(n), most, False) for n, most in rules.top_ngrams] + [
        (int(n), m, True) for n, m in rules.duplicate_ngrams
    ]
    for n, most, is_repeat in sorted(wanted):
        ngrams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        counts = Counter(ngrams)
        if is_repeat:
            seen, covered = set(), set()
            for i, ngram in enumerate(ngrams):
                covered |= set(range(i, i + n)) if ngram in seen else set()
                seen.add(ngram)
            share = sum(len(units[i]) for i in covered) / total
        else:
            share = max((sum(map(len, g)) * c for g, c in counts.items() if c > 1), default=0) / total
        if share > most:
            return ("repeated n-grams" if is_repeat else "one n-gram"), f"{n}-grams {share:.3g}, over {most:g}"
    return None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("a bb ccc dd e".split()), min_size=3, max_size=60),
    st.sampled_from([0.05, 0.3, 0.6]),
    st.lists(st.sampled_from([2, 3, 4]), max_size=2, unique=True),
    st.lists(st.sampled_from([3, 5, 6, 9]), max_size=3, unique=True),
)
def test_shares_of_ngrams_are_those_of_the_definition(
    units: list[str], most: float, top: list[int], duplicate: list[int]
) -> None:
    rules = Rules(repetition_from=3, top_ngrams=[[n, most] for n in top],
                  duplicate_ngrams=[[n, most] for n in duplicate], max_duplicate_lines=0,
                  max_duplicate_line_characters=0)  # fmt: skip
    found, expected = repetition(" ".join(units), rules), plainly(units, rules)
    assert (found and (found[0], found[1].split("repeated ")[-1].split("one ")[-1])) == expected


def test_repeated_lines_and_paragraphs_but_not_rules_and_brackets() -> None:
    lines = [f"the line number {n} of {n * 7} different ones" for n in range(10)]
    assert repetition("\n".join(lines), Rules(repetition_from=999)) is None
    assert repetition("\n".join(lines + lines[:5]), Rules(repetition_from=999)) == (
        "repeated lines",
        "share 0.333, over 0.3",
    )
    assert repetition("\n".join(["}", "---", "|---|", "***"] * 30 + lines), Rules(repetition_from=999)) is None
    parts = [f"{'word ' * n}{n}.\nsecond {n}" for n in range(3, 9)]
    found = repetition(
        "\n\n".join(parts + parts[:3]),
        Rules(repetition_from=999, max_duplicate_lines=0, max_duplicate_line_characters=0),
    )
    assert found is not None and found[0] == "repeated paragraphs"


def test_units_of_languages_without_spaces() -> None:
    assert units_of("我们用 Python3 写。", "character") == ["我", "们", "用", "Python3", "写", "。"]
    assert units_of("a b-c 가나", "word") == ["a", "b-c", "가나"]


@pytest.mark.parametrize("hostile", ["a " * 150_000, "…" * 200_000, "\n" * 200_000 + "a", "가" * 300_000, "a\n\n" * 60_000,
                                     "`" * 100_000, "<a" * 100_000, "a/" * 100_000, "~~~\n" * 50_000])  # fmt: skip
def test_hostile_text_costs_no_more_than_its_length(hostile: str) -> None:
    begin = time.process_time()
    for language in ("en", "zh"):
        judge(hostile, SETTINGS.rules_of(language))
        LanguageFinder(SETTINGS.languages)(hostile, language)
    assert time.process_time() - begin < 10


# ------------------------------------------------------------------------------------------------ languages


def test_another_language_is_removed_relabelled_or_kept() -> None:
    for choice, expected in (("remove", ("vi", "other language")), ("relabel", ("zh", None)), ("keep", ("vi", None))):
        found = LanguageFinder(LanguageChoice(on_other=choice))(GOOD["zh"], "vi")
        assert (found.language, found.verdict and found.verdict.rule) == expected


def test_a_doubtful_find_leaves_a_document_its_language() -> None:
    assert LanguageFinder(LanguageChoice(sure=1.01))(GOOD["zh"], "vi").verdict is None
    assert LanguageFinder(LanguageChoice(least=1.01))(GOOD["zh"], "und").verdict is not None


def test_languages_not_wanted_uncertain_and_short() -> None:
    find = LanguageFinder(LanguageChoice(["en", "ko", "zh"]))
    assert find(GOOD["ru"], "ru").verdict.rule == "language not wanted"  # type: ignore[union-attr]
    assert find("12345 67890", "und").verdict.rule == "language uncertain"  # type: ignore[union-attr]
    assert find("OK, cancel", "ko").verdict is None  # too short to say otherwise
    assert find(GOOD["en"], "eng").language == "en"
    assert find("한국어 문장은 여기 조금뿐이다. " + "`def code(): return english_words` " * 50, "ko").language == "ko"


def test_only_configured_languages_are_found() -> None:
    random.seed(1)
    find = LanguageFinder(LanguageChoice(["ko", "ja"], least=0.0))
    assert {find(text, "und").language for text in GOOD.values()} <= {"ko", "ja"}
    with pytest.raises(ConfigError, match="xx"):
        LanguageFinder(LanguageChoice(["en", "xx"]))


# ------------------------------------------------------------------------------------------------ settings


def loaded(folder: Path, text: str):
    (folder / "rules.yaml").write_text(text, encoding="utf-8")
    return load_settings(str(folder / "rules.yaml"))


def test_a_file_goes_over_the_defaults_of_every_language_and_its_languages_over_it(tmp_path: Path) -> None:
    found = loaded(
        tmp_path, "rules: {min_characters: 10}\nby_language: {ko: {min_characters: 12, spam: []}}\nsamples: 3\n"
    )
    assert [found.rules_of(x).min_characters for x in ("en", "zh", "ko", "xx")] == [10, 10, 12, 10]
    assert found.rules_of("zh").unit == "character" and found.rules_of("ko").spam == [] and found.samples == 3
    assert found.rules_of("ko").scripts == ["Hangul"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rulez: {}", "unknown key 'rulez'; did you mean 'rules'"),
        ("rules: {min_charakters: 3}", "unknown key 'min_charakters'; did you mean 'min_characters'"),
        ("by_language: {ko: {min_words: 3}}", "unknown key 'min_words'"),
        ("by_language: {kx: {min_characters: 3}}", "by_language.kx is no language"),
        ("rules: {min_characters: many}", "must be a whole number"),
        ("rules: {unit: letter}", "must be one of word, character"),
        ("languages: {allowed: []}", "allowed is empty"),
        ("rules: {top_ngrams: [[1, 0.2]]}", "must hold pairs"),
        ("rules: {duplicate_ngrams: [[5, -1]]}", r"share of \[5.0, -1.0\] .* is -1; it must lie between 0 and 1"),
        ("rules: {max_digits: 20}", "max_digits of .* is 20; it must lie between 0 and 1"),
        ("by_language: {ko: {min_script: -0.1}}", "min_script of ko is -0.1; it must lie between 0 and 1"),
        ("languages: {sure: 2}", "languages.sure is 2; it must lie between 0 and 1"),
        ("rules: {min_characters: -5}", "min_characters of .* is -5; it must not be negative"),
        ("rules: {min_characters: 9, max_characters: 3}", r"max_characters \(3\) .* nothing would stay"),
        ("dedup: {bands: 100000}", "bands of deduplication is 100000; give one from 1 to 256"),
        ("dedup: {ngram: 0}", "ngram of deduplication is 0; give one from 1 to 100"),
        ("personal_data: {phone: '<555>'}", "personal_data.phone"),
        ("dedup: {bands: 0}", "bands"),
        ("rules: {scripts: [Klingon]}", "scripts of .*: 'Klingon' is no script of Unicode"),
        ("fixes: {most_blank_lines: -1}", "fixes.most_blank_lines must lie between 0 and 1000000"),
        ("fixes: {longest_token: 99999999999}", "fixes.longest_token must lie between"),
        ("fixes: {emoticon_repeats: 99999999999}", "fixes.emoticon_repeats must lie between"),
        ("samples: -1", "samples must not be negative"),
        ("- a", "top level must hold keys"),
        ("rules: {min_characters: 3", "not valid YAML"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, text)
    assert "rules.yaml" in str(caught.value) or "dedup" in text


def test_the_example_of_the_documentation_is_a_configuration(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/cleaning.md").read_text(encoding="utf-8")
    found = loaded(tmp_path, page.split("```yaml\n")[1].split("```")[0])
    assert found.rules_of("ko").min_characters == 100 and found.kenlm["ko"].most_perplexity == 800
    assert found.personal_data.ip is None and found.dedup is not None and found.dedup.rows == 6
    for rules in vars(Rules()):
        assert rules in page or rules.replace("max_duplicate", "..") in page, f"{rules} is not documented"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        load_settings("nowhere.yaml")
