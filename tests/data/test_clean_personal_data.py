"""Personal data is found by its form, check digits and dates; numbers that are none of it survive."""

import time
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megapoly.data.clean.personal_data import (
    PersonalData,
    is_card,
    is_citizen_number,
    is_iban,
    is_resident_number,
)
from megapoly.data.clean.settings import Tokens

REPLACE = PersonalData(Tokens())


def replaced(text: str, language: str = "ko") -> str:
    return REPLACE(text, language, Counter())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("메일은abc.d+e@naver.com으로", "메일은<|email|>으로"),
        ("(Jo <jo@uni-x.ac.kr>)", "(Jo <<|email|>>)"),
        ("전화 010-1234-5678번", "전화 <|tel|>번"),
        ("01012345678입니다", "<|tel|>입니다"),
        ("(02) 123-4567", "<|tel|>"),
        ("031-123-4567, 070.1234.5678", "<|tel|>, <|tel|>"),
        ("call +82 10-1234-5678 or +1 (555) 123-4567.", "call <|tel|> or <|tel|>."),
        ("(555) 123-4567 / 555-123-4567", "<|tel|> / <|tel|>"),
        ("06 12 34 56 78", "<|tel|>"),
        ("주민번호 901231-1234563", "주민번호 <|rrn|>"),
        ("900101-3234567", "<|rrn|>"),
        ("4111 1111 1111 1111", "<|crd|>"),
        ("3782-822463-10005", "<|crd|>"),
        ("DE89 3704 0044 0532 0130 00", "<|acc|>"),
        ("국민은행 123456-01-123456", "국민은행 <|acc|>"),
        ("계좌번호: 110-123-456789 (홍)", "계좌번호: <|acc|> (홍)"),
        ("from 81.2.69.142 and 2001:4860:4860::8888", "from <|ip|> and <|ip|>"),
    ],
)
def test_personal_data_gets_its_token(text: str, expected: str) -> None:
    assert replaced(text) == expected


@pytest.mark.parametrize("language", ["ko", "en", "zh", "code"])
@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1 0.0.0.0 192.168.0.10 10.1.2.3 255.255.255.0 ::1 169.254.1.1",
        "version 81.2.69.142, v1.2.3.4, 1.2.3.4, Chrome/120.0.6099.109, 버전 200.100.50.25",
        "2024-01-15 01.02.2024 15/01/2024 2024-01-15T10:30:45+09:00 01-02-2024 1990-2000",
        "10,000원 1,234,567.89 $1234567890 8 000 000 000 0.123456789 3.14159265358979",
        "ISBN 978-89-123-4567-8, ISBN: 0-306-40615-2, ISBN 978-0-306-40615-7, doi 10.1000/182",
        "1700000000000 1234567890123 20240115123456 123456789012345678 00000000 0000 0001 0010 0011",
        "user@example.com, @app.get('/'), icon@2x.png, git@github.com:a/b.git, react@18.2.0, a@b",
        "deadbeef0123456789 550e8400-e29b-41d4-a716-446655440000 01:23:45:67:89:ab 12:30:45 std::vector a::b",
        "4111 1111 1111 1112, 1111 1111 1111 1111, 901331-1234567, 900230-1234567, 900101-9234567",
        "GB82 WEST 1234 5698 7654 33, ABCD1234EFGH5678",
        "37.5665, 126.9780; 1 2 3 4 5 6 7 8 9 10; 100-200-300; 1588-1234; 20-30-40-50",
        "rows = [[1234, 5678], [9012, 3456]]; port=8080; 0x1F4A9; #123456; 555 123 4567",
    ],
)
def test_what_is_no_personal_data_survives(text: str, language: str) -> None:
    assert replaced(text, language) == text


def test_languages_differ_where_the_same_digits_mean_something_else() -> None:
    assert replaced("13812345678", "zh") == "<|tel|>" and replaced("13812345678", "en") == "13812345678"
    assert replaced("01012345678", "en") == "01012345678"
    assert (
        replaced("11010519491231002X", "zh") == "<|rrn|>"
        and replaced("110105194912310021", "zh") == "110105194912310021"
    )


def test_check_digits() -> None:
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    for first, more in (("900101123456", 0), ("900101523456", 2)):  # the second one's holder is a foreigner
        check = 11 - sum(int(a) * b for a, b in zip(first, weights, strict=True)) % 11 + more
        assert [is_resident_number(f"{first}{(check + n) % 10}") for n in range(10)] == [True] + [False] * 9
    assert is_resident_number("000229-3234567") and not is_resident_number("010229-3234567")  # 2000 was a leap year
    assert is_citizen_number("11010519491231002X") and not is_citizen_number("110105194912310020")
    assert is_card("4012888888881881") and not is_card("4012888888881882") and not is_card("0" * 16)
    assert is_iban("GB82 WEST 1234 5698 7654 32") and not is_iban("GB82 WEST 1234 5698 7654 33")


def test_kinds_are_counted_and_can_be_turned_off_or_renamed() -> None:
    found: Counter[str] = Counter()
    REPLACE("a@b.co.kr, c@d.kr, 010-1234-5678, 901231-1234563", "ko", found)
    assert found == {"email": 2, "phone": 1, "resident_number": 1}
    other = PersonalData(Tokens(email=None, phone="[PHONE]", account=None))
    text = "a@b.co.kr, 010-1234-5678, DE89370400440532013000, 은행 123-45-678901"
    assert other(text, "ko", Counter()) == text.replace("010-1234-5678", "[PHONE]")


NOISE = st.text(alphabet="0123456789 -.()+:/,abc@가\n", max_size=60)
KNOWN = st.sampled_from(
    ["010-1234-5678", "a@b.kr", "901231-1234563", "4111 1111 1111 1111", "81.2.69.142", "은행 12-34-567"]
)


@settings(max_examples=600, deadline=None)
@given(st.lists(NOISE | KNOWN, max_size=6), st.sampled_from(["ko", "en", "zh"]))
@example(["00000.00.00+100000000"], "ko")
@example(["은행 12-34-567가00-00-00"], "ko")
def test_replacing_twice_equals_once(parts: list[str], language: str) -> None:
    once = replaced("".join(parts), language)
    assert replaced(once, language) == once


@pytest.mark.parametrize("hostile", ["1" * 200_000, "1-" * 100_000, "(0" * 100_000, "a@" * 100_000, "a." * 100_000,
                                     "+1 " * 70_000, "x@" + "a." * 100_000, "2001:" * 40_000, "AB12 " * 40_000,
                                     "00 " * 70_000, "은행" * 60_000 + "1-", "1.1." * 50_000,
                                     f"+{'1' * 40} " * 5_000, f"00{'1' * 40}\n" * 5_000])  # fmt: skip
def test_hostile_text_costs_no_more_than_its_length(hostile: str) -> None:
    begin = time.process_time()
    replaced(hostile)
    assert time.process_time() - begin < 5
