"""Pairs of sentences: a line becomes a text for each template, in the same order and on the same side everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.data.indexed import IndexedDataset
from megapoly.data.preprocess import preprocess
from megapoly.data.templates import Template, fields_of
from megapoly.errors import ConfigError, DataError
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_sentencepiece

ROOT = Path(__file__).parents[2]
TYPE = "SentencePieceTokenizer"
PAIRS = [{"id": f"p{i}", "en": f"sentence {i} says {'hello ' * (i % 4)}", "ko": f"문장 {i} 안녕"} for i in range(40)]
THERE, BACK = Template.parse(r"en-ko={en}\n{ko}"), Template.parse(r"ko-en={ko}\n{en}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    train_sentencepiece([text for pair in PAIRS for text in (pair["en"], pair["ko"])], path, 320)
    return path


def write(folder: Path, pairs: list[dict[str, str]]) -> str:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(folder / "pairs.jsonl")


def read(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


plain = st.text(st.characters(codec="utf-8", exclude_characters="{}\\="), max_size=6)


@given(plain, plain, plain, st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_a_template_is_filled_in(before: str, between: str, after: str, one: str, other: str) -> None:
    template = Template.parse(f"x={before}{{a}}{between}{{b}}{after}{{a}}{{{{}}}}")
    assert template.fields == ["a", "b"]
    assert template.render({"a": one, "b": other}) == f"{before}{one}{between}{other}{after}{one}{{}}"
    assert template.render({"a": one, "b": " \n"}) == template.render({"a": "", "b": other}) == ""


def test_signs_that_a_shell_makes_hard_to_write() -> None:
    assert Template.parse(r"x={a}\n\t\\n\x{b}=").render({"a": "{b}", "b": r"\n"}) == "{b}\n\t\\n\\x\\n="
    assert fields_of([THERE, Template.parse("x={lang}{en}")]) == ("en", "ko", "lang")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{en}", "must be NAME=TEXT, such as 'en-ko={en}"),
        ("={en}", "must be NAME=TEXT"),
        ("x=nothing", "has no field"),
        ("x={en", "write {{ and }} for braces"),
        ("x=}{en}", "write {{ and }} for braces"),
        ("x={}", "a field is written {name}"),
        ("x={en.__class__}", "a field is written {name}"),
        ("x={en[0]}", "a field is written {name}"),
        ("x={en!r}", "a field is written {name}"),
        ("x={en:>9}", "a field is written {name}"),
    ],
)
def test_what_is_no_template_is_refused(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template.parse(given)
    assert said in str(caught.value)


def test_each_direction_is_an_output(tmp_path: Path, model: str) -> None:
    source = write(tmp_path, PAIRS)
    preprocess([source], str(tmp_path / "p"), TYPE, model, templates=[THERE, BACK], append_eod=True)
    tokenizer = load_tokenizer(TYPE, model)
    for name, text in (("en-ko", "{en}\n{ko}"), ("ko-en", "{ko}\n{en}")):
        expected = [[*tokenizer.encode(text.format(**pair)), tokenizer.eod] for pair in PAIRS]
        assert read(tmp_path / f"p_{name}_document") == expected
    assert sorted(name for name in os.listdir(tmp_path) if "document" in name) == [
        f"p_{name}_document.{kind}" for name in ("en-ko", "ko-en") for kind in ("bin", "idx")
    ]


def test_both_directions_are_held_out_together_and_by_any_reader(tmp_path: Path, model: str) -> None:
    inputs = [write(tmp_path, PAIRS), str(tmp_path / "pairs.parquet")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), inputs[1])
    of_reader = []
    for i, source in enumerate(inputs):
        summary = preprocess([source], str(tmp_path / f"{i}"), TYPE, model, templates=[THERE, BACK], valid_fraction=0.3)
        names = [f"{tmp_path}/{i}_{side}{name}_document" for side in ("", "valid_") for name in ("en-ko", "ko-en")]
        of_reader.append([read(name) for name in names])
        counts = [len(documents) for documents in of_reader[-1]]
        assert counts[0] == counts[1] == summary.documents and counts[2] == counts[3] == summary.held_out > 0
        assert counts[0] + counts[2] == len(PAIRS)
    assert of_reader[0] == of_reader[1]


def test_half_a_pair_is_none(tmp_path: Path, model: str) -> None:
    source = write(tmp_path, [*PAIRS[:3], {"en": "alone", "ko": " "}, {"en": "alone"}])
    with pytest.raises(DataError, match="line 5: key 'ko' is missing"):
        preprocess([source], str(tmp_path / "p"), TYPE, model, templates=[THERE])
    summary = preprocess([source], str(tmp_path / "p"), TYPE, model, templates=[THERE], on_bad_line="skip")
    assert (summary.documents, summary.empty, sum(summary.bad_lines.values())) == (3, 1, 1)
    with pytest.raises(DataError, match="two outputs would be PREFIX_en-ko_document"):
        preprocess([source], str(tmp_path / "q"), TYPE, model, templates=[THERE, THERE])


def test_the_command(tmp_path: Path, model: str) -> None:
    source = write(tmp_path, PAIRS)
    common = [
        "--input",
        source,
        "--output-prefix",
        str(tmp_path / "c"),
        "--tokenizer-type",
        TYPE,
        "--tokenizer-model",
        model,
    ]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *common, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = run("--template", r"en-ko={en}\n{ko}")
    assert done.returncode == 0, done.stderr
    preprocess([source], str(tmp_path / "p"), TYPE, model, templates=[THERE])
    assert read(tmp_path / "c_en-ko_document") == read(tmp_path / "p_en-ko_document")
    for wrong in (["--template", "{en}"], ["--template", "x={en}", "--json-keys", "en"]):
        refused = run(*wrong)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
