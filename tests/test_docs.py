"""What the documents name is there: flags, files, tests, targets of make, presets, tools, links."""

import re
import subprocess
from pathlib import Path

import pytest

from megapoly.cli import ALIASES
from megapoly.config import LEAVES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "kernels/README.md", *sorted(ROOT.glob("docs/*.md"))]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*[a-z0-9])")
# Flags of torchrun, pip, Slurm and Megatron-LM that the documents speak of.
FOREIGN = {
    "nproc-per-node", "nnodes", "node-rank", "rdzv-backend", "rdzv-endpoint", "standalone", "max-restarts",
    "signals-to-handle", "extra-index-url", "signal", "data-path", "split-sentences", "train-samples",
}  # fmt: skip


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def known_flags() -> set[str]:
    flags = {name.replace("_", "-") for name in [*LEAVES, *ALIASES]}
    for path in [*ROOT.glob("megapoly/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("examples/*.*"),
                 *ROOT.glob("kernels/**/*.py"), ROOT / "tests/faults/campaign.py"]:  # fmt: skip
        flags |= set(re.findall(r'"--([a-z][\w-]*)"', path.read_text(encoding="utf-8")))
    return flags | {f"no-{flag}" for flag in flags}


def tracked() -> set[str]:
    """Files of the project and their folders, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {str(parent) for name in listed.splitlines() for parent in [Path(name), *Path(name).parents]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_are_named_exist(document: Path) -> None:
    assert set(FLAG.findall(text_of(document))) <= known_flags() | FOREIGN


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_targets_that_are_named_exist(document: Path) -> None:
    text, files = text_of(document), tracked()
    named = re.findall(
        r"\b((?:megapoly|kernels|examples|tools|tests|docs)/[\w/.-]+\.(?:py|sh|cpp|md|yaml|sbatch|png))", text
    )
    assert [name for name in named if name not in files] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`(?:time )?make ([a-z-]+)", text)) - {"check"} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)?(?:#([\w-]+))?\)", text_of(document)):
        target = (document.parent / link[0]) if link[0] else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", text_of(target), re.MULTILINE) if link[1] else []
        assert not link[1] or link[1] in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings}


def spelled_out(word: str) -> list[str]:
    """`a-{b,c}[-d]` as a-b, a-b-d, a-c, a-c-d."""
    found = re.search(r"\{([^}]*)\}|\[([^]]*)\]", word)
    if found is None:
        return [word]
    choices = found[1].split(",") if found[1] else ["", *found[2].split(",")]
    return [name for choice in choices for name in spelled_out(word[: found.start()] + choice + word[found.end() :])]


def test_the_readme_has_every_tool_and_preset() -> None:
    text = text_of(ROOT / "README.md")
    assert [path.name for path in ROOT.glob("tools/*.py") if f"tools/{path.name}" not in text] == []
    listed = re.search(r"is a preset \(`([^`]+)`\)", text)
    assert listed is not None
    presets = [name for word in listed[1].split() for name in spelled_out(word)]
    assert sorted(presets) == sorted(path.stem for path in ROOT.glob("megapoly/presets/*.yaml"))


def test_the_modules_in_the_readme_exist() -> None:
    table = text_of(ROOT / "README.md").partition("## The code")[2].partition("## ")[0]
    there = {path.name for path in ROOT.glob("megapoly/**/*.*")}
    named = [Path(name).name for name in re.findall(r"[\w/]+\.(?:py|cpp)\b", table)]
    assert len(named) > 40 and [name for name in named if name not in there] == []
