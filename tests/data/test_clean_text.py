"""Mending text: what must survive survives, what is noise goes, and a second cleaning changes nothing."""

import dataclasses
import re
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megapoly.data.clean.cleaner import Cleaner
from megapoly.data.clean.fixes import TextFixer, Unsettled, fix_newlines
from megapoly.data.clean.korean import letters_of_lone_jamo, shorten_emoticons
from megapoly.data.clean.settings import Fixes, Settings, load_settings

FIX = TextFixer(Fixes())
# Pieces in which one fault or another lies in wait.
PIECES = (
    "안녕ㅋㅋㅋㅋ", "10000원", "1,000,000", "하하하하", "ㅠㅠㅠㅠ", "ᄒᆞᆫ글", "ᄏᄏᄏ", "\u1112\u1161\u11ab글", "def f():", "    return 1",
    "\treturn 2", "\n", "\n\n\n\n\n", "  ", "\r\n", "\u2028", "\u200b", "\ufeff", "\u200d", "`a <b> &amp;`", "```\nif x:\n    y &lt; 1\n```",
    "~~~", "<b>bold</b>", "<br/>", "<p class='a'>", "<td>", "<!-- x -->", "<script>x</script>", "&amp;", "&lt;", "amp;", "&nbsp;", "&#8203;",
    "&#x60;", "http://a.b/c", "https://example.com", "a", "ー", "。", "😀👨\u200d👩", "\u0301", "é", "Å", "x" * 401, "0.10 ", "#", "…", "`", "``", "```",
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=14).map("".join)


def fixed(text: str, language: str = "en") -> str:
    return FIX(text, language, Counter())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("안녕ㅋㅋㅋㅋ", "안녕ㅋㅋ"),  # a syllable is lost elsewhere: 안ㅋㅋ
        ("10000원", "10000원"),  # 100원
        ("def f():\n    return 1", "def f():\n    return 1"),  # one line
        ("와아아아아 ㅠㅠㅠㅠ", "와아아아아 ㅠㅠ"),
        ("ㅇㅅㅇ ㅋㅎㅋㅎ", "ㅇㅅㅇ ㅋㅎㅋㅎ"),
        ("1111 22.2222 %%%%", "1111 22.2222 %%%%"),
    ],
)
def test_what_another_cleaner_of_korean_corrupts_survives(text: str, expected: str) -> None:
    assert fixed(text, "ko") == expected


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.sampled_from(["en", "ko", "ar", "th"]))
@example("&amp;amp;lt;b&gt;", "en")
@example("&am\u200bp;<b>lt;", "en")
@example("```\n<b>\n", "en")
@example("x\n\n\n<p>\n\n`\n", "en")
def test_a_second_mending_changes_nothing(text: str, language: str) -> None:
    once = fixed(text, language)
    assert fixed(once, language) == once


PLAIN_LINES = st.lists(
    st.tuples(
        st.sampled_from(["", "  ", "    ", "\t", "\t\t", "\u3000"]),
        st.text(alphabet="abc 0123456789.,()[]{}=+-*/'\":;한글안녕ひらカタ漢字กขكتабв", min_size=1, max_size=30),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(PLAIN_LINES)
def test_newlines_indentation_digits_and_repeats_survive(lines: list[tuple[str, str]]) -> None:
    text = "\n".join(indent + (body.strip() or "x") for indent, body in lines)
    assert fixed(text, "ko") == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="가나다하핳ㅋㅠㅏ12 \n", max_size=40), st.integers(1, 4))
def test_only_letters_without_a_syllable_are_shortened(text: str, most: int) -> None:
    short, runs = shorten_emoticons(text, most)
    outside = re.sub("[ㅋㅠㅏ]+", "|", text)
    assert re.sub("[ㅋㅠㅏ]+", "|", short) == outside
    assert (short != text) == bool(runs) == any(len(run[0]) > most for run in re.finditer(r"([ㅋㅠㅏ])\1*", text))


def test_code_in_a_document_keeps_its_signs_and_prose_around_it_loses_markup() -> None:
    text = "Use <b>this</b> &amp; that:\n\n```html\n<b>x</b> &amp; ㅋㅋㅋㅋ\nhttp://a.b/c\n```\nor `<br> &amp; ㅋㅋㅋㅋ` <i>now</i>ㅋㅋㅋㅋ\n"
    expected = (
        "Use this & that:\n\n```html\n<b>x</b> &amp; ㅋㅋㅋㅋ\nhttp://a.b/c\n```\nor `<br> &amp; ㅋㅋㅋㅋ` nowㅋㅋ"
    )
    assert fixed(text) == expected


def test_a_fence_without_an_end_keeps_all_that_follows() -> None:
    assert fixed("a\n~~~\n<b>x</b>\n```\n<i>y</i>") == "a\n~~~\n<b>x</b>\n```\n<i>y</i>"


def test_escaped_markup_is_text_about_markup_and_stays() -> None:
    assert (
        fixed("write &lt;b&gt; and &amp;nbsp; or AT&amp;T &quot;x&quot; &#65;")
        == 'write &lt;b&gt; and &amp;nbsp; or AT&T "x" A'
    )


def test_markup_goes_and_lines_stay_apart() -> None:
    done: Counter[str] = Counter()
    text = FIX(
        "<p>one</p><p>two<br>three</p><!-- no\nno --><script>var a = 1;</script><td>4</td><td>5</td> a < b > c",
        "en",
        done,
    )
    assert text.split() == ["one", "two", "three", "4", "5", "a", "<", "b", ">", "c"]
    assert "one\n" in text and "two\nthree" in text and done["HTML"] >= 8


@pytest.mark.parametrize(
    "text",
    [
        "if a<b>c then a <b and c> d",
        "vector<a> is no Map<I, S>, List<S> and Foo<P>",
        "cp <input> <link> or git reset <HEAD>",
        "x<p>y, and `</p>` in code\n```\n<b>z</b></i>\n```\nis no page: <i>",
        "집합 {x: a<b>c} 10000원 하하하하\n    들여쓰기<s>",
    ],
)
def test_signs_of_less_and_greater_in_prose_are_no_markup(text: str) -> None:
    assert fixed(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one<p>two<p>three", "one\ntwo\nthree"),
        ("<p>one <b>`x`</b><input> two", "one `x` two"),  # closed behind code
        ("<td width=3>4<td>5", " 4 5"),
        ("one<br>two<HR/>three<i class=x>", "one\ntwo\nthree"),
        ("<body><img>one</div>", "one"),
        ("</b>a<i>b<b>c", "a<i>bc"),
    ],
)
def test_tags_of_a_page_go_closed_or_not(text: str, expected: str) -> None:
    assert fixed(text) == expected


def test_joiners_and_marks_stay_where_a_script_needs_them() -> None:
    family, persian = "👨\u200d👩\u200d👧", "می\u200cخواهم"
    assert fixed(f"{family} {persian} a\u200bb\u00adc\ufeff\x07") == f"{family} {persian} abc"
    assert fixed("a\u200fb", "he") == "a\u200fb" and fixed("a\u200fb", "en") == "ab"


def test_form_c_and_lone_jamo() -> None:
    word = "한글 각"
    assert fixed(unicodedata.normalize("NFD", word), "ko") == word
    assert fixed("\u110f\u110f", "ko") == "ㅋㅋ" and letters_of_lone_jamo("\u11a8") == "ㄱ"
    assert fixed("ᄒᆞᆫ", "ko") == "ᄒᆞᆫ"  # an old syllable has no other form


def test_lines_of_no_use_go_and_are_counted() -> None:
    fix, done = TextFixer(Fixes(boilerplate=["무단전재"])), Counter[str]()
    text = (
        "본문이다.\nhttps://example.com/very/long\n"
        + "A" * 500
        + "\n저작권자 무단전재 금지\n\n\n\n\n끝 https://example.com  \n"
    )
    assert fix(text, "ko", done) == "본문이다.\n\n\n끝 https://example.com"
    assert done == {"lines that are one address": 1, "lines with an endless word": 1, "boilerplate lines": 1,
                    "blank lines": 1, "spaces at ends of lines": 1}  # fmt: skip


def test_each_fix_can_be_turned_off() -> None:
    off = TextFixer(Fixes(nfc=False, invisible=False, html=False, url_lines=False, longest_token=0, emoticon_repeats=0))
    text = "e\u0301 \u200b <b> &amp; ㅋㅋㅋㅋ \u110f\nhttps://example.com\n" + "A" * 500
    assert off(text, "ko", Counter()) == text


@pytest.mark.parametrize("hostile", ["<script>" * 20_000, "<!--" * 20_000, " " * 300_000 + "x", "`" * 20_000,
                                     "<p " * 20_000, "&" * 50_000, "&amp;" * 20_000, "\n " * 50_000,
                                     "ㅋ" * 50_000, "~~~\n" * 20_000, "[" * 50_000, "<" * 50_000])  # fmt: skip
def test_hostile_text_costs_no_more_than_its_length(hostile: str) -> None:
    begin = time.process_time()
    FIX(hostile, "ko", Counter())
    assert time.process_time() - begin < 8


def test_markup_without_an_end_removes_the_document() -> None:
    # Each tag comes to light when the one inside it is gone.
    deep = "<" * 31 + "/b>" * 31
    with pytest.raises(Unsettled):
        FIX(deep, "en", Counter())
    verdict = Cleaner(Settings())(deep, "en").verdict
    assert verdict is not None and verdict.rule == "endless markup"


def lenient() -> Settings:
    """Settings under which short texts pass, so that more of them are compared."""
    loaded = load_settings()
    rules = dataclasses.replace(
        loaded.rules, min_characters=1, min_mean_word=0, max_mean_word=0, min_alphabetic_words=0, max_digits=0,
        max_symbols_per_word=0, max_damaged=0, max_ellipsis_lines=0, max_bullet_lines=0, max_duplicate_lines=0,
        max_duplicate_line_characters=0, max_duplicate_paragraphs=0, max_duplicate_paragraph_characters=0,
    )  # fmt: skip
    return dataclasses.replace(loaded, by_language={name: rules for name in loaded.by_language})


CLEAN = Cleaner(lenient())

CODE = '\ufeff#include <b>\r\nint f() {\r\n\tchar *s = "&amp;ㅋㅋㅋㅋ";  \r\n\r\n\r\n\r\n\r\n\treturn 10000;\r\n}\r\n'


def test_a_document_of_code_keeps_all_but_its_kind_of_newline() -> None:
    clean = Cleaner(load_settings())
    for language, kind in (("code", "text"), ("en", "code"), ("und", "code")):
        outcome = clean(CODE, language, kind)
        assert outcome.verdict is None and outcome.language == "code"
        assert outcome.text == CODE.replace("\r\n", "\n").removeprefix("\ufeff") == fix_newlines(CODE)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from(["en", "ko", "und"]))
def test_cleaning_twice_equals_once(text: str, language: str) -> None:
    clean = CLEAN
    once = clean(text, language)
    if once.verdict is None:
        twice = clean(once.text, once.language)
        assert (twice.text, twice.language, twice.verdict) == (once.text, once.language, None)


def test_nothing_of_a_page_s_skeleton_stays() -> None:
    page = (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<title>Shop</title><meta charset='utf-8'>\n</head>\n<body>\n<main>\n"
        "<p>The clockmaker.</p>\n<blockquote>He was old.</blockquote>\n<dl><dt>a</dt><dd>b</dd></dl></main></body>\n</html>"
    )
    assert FIX(page * 2, "en", Counter()).split() == "Shop The clockmaker. He was old. a b".split() * 2
