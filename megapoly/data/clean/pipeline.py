"""Cleaning a corpus: inputs to tasks, stages in order, and what lets an interrupted run go on."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.data.clean.machines import Machines, check_machines
from megapoly.data.documents import no_documents
from megapoly.data.resume import Workspace, only_writer
from megapoly.data.text_input import Limits, Wanted, describe_input, expand_inputs
from megapoly.errors import DataError, MegapolyError
from megapoly.log import duration

TASK_BYTES = 64 << 20  # of the inputs' files
MOST_TASKS = 1000  # what arrays of Slurm commonly allow
PACKAGES = ("datatrove", "orjson", "rensa")
HERE = Machines()
_OUTPUT = re.compile(r"[0-9]{5}\.jsonl\.gz(\.tmp)?")


@dataclass(frozen=True)
class Reading:
    """How inputs are read: the keys of text and language, and whether bad lines are passed over."""

    text_key: str = "text"
    language_key: str = "lang"
    skip_bad_lines: bool = False
    limits: Limits = Limits()


def clean_corpus(
    inputs: Sequence[str],
    output_dir: str,
    config: str | None = None,
    tasks: int | None = None,
    reading: Reading = Reading(),
    machines: Machines = HERE,
    restart: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Files and patterns to cleaned JSONL by language, samples and a report in output_dir.

    An interrupted run goes on, from the tasks that are done; a finished one does nothing. Returns the report, or None
    where Slurm has the work now. Raises DataError, also for inputs without any document, and ConfigError.
    """
    _need_packages()
    from megapoly.data.clean.cleaner import Cleaner
    from megapoly.data.clean.executors import run_stages
    from megapoly.data.clean.settings import load_settings

    settings = load_settings(config)
    check_machines(machines)
    paths = [os.path.abspath(path) for path in expand_inputs(inputs)]
    described = [describe_input(path) for path in paths]
    tasks = _tasks(tasks, described)
    Cleaner(settings)  # languages and models that cannot be used are found before any work
    out = Path(output_dir).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with only_writer([str(out)]):
            workspace = Workspace(str(out / "work"))
            options = dict(_flat("", dataclasses.asdict(settings) | dataclasses.asdict(reading))) | {"tasks": tasks}
            if workspace.begin(options, described, restart) is None:
                _make_room(out, restart)
                workspace.save({"options": options, "inputs": described})
            stages = _stages(paths, out, workspace.folder, tasks, reading, settings)
            megabytes = sum(entry["bytes"] for entry in described) / 1e6
            log(f"{len(paths)} files, {megabytes:.1f} MB on disk, {tasks} tasks -> {out}")
            if (workspace.folder / "logs" / "report" / "completions" / "00000").exists():
                log("all of it is done already")
                return read_report(out)
            begin = time.monotonic()
            try:
                if not run_stages(stages, workspace.folder, machines, log):
                    return None
            except MegapolyError:
                if not any(workspace.folder.glob("logs/*/completions/*")):
                    workspace.forget()  # with nothing to go on with, the next run need not be like this one
                raise
            report = read_report(out)
            if not report["all"]["read"]["documents"]:
                workspace.remove()
                raise no_documents(inputs, {"bad lines": sum(report["all"]["bad_lines"].values())})
            log(f"done in {duration(time.monotonic() - begin)}: {out / 'report.md'}")
            if not report["all"]["kept"]["documents"]:
                log(f"warning: none of the {report['all']['read']['documents']} documents is kept; the report says why")
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}; check --output-dir") from None
    return report


def read_report(out: Path) -> dict[str, Any]:
    """The report of a finished run; raises DataError where there is none."""
    try:
        tree: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return tree
    except (OSError, ValueError):
        raise DataError(f"{out / 'report.json'}: is missing or damaged; give --restart to clean anew") from None


def _need_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"cleaning needs the package {missing[0]}; pip install 'megapoly[clean]'")


def _tasks(given: int | None, described: list[dict[str, Any]]) -> int:
    """Tasks depend on the inputs alone, so that another machine makes the same of them."""
    if given is not None:
        if not 1 <= given <= 99_999:
            raise DataError(f"--tasks ({given}) must lie between 1 and 99999")
        return given
    size = sum(entry["bytes"] for entry in described)
    return min(MOST_TASKS, max(len(described), -(-size // TASK_BYTES)))


def _flat(prefix: str, tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested keys as one level, so that a difference names the single value that differs."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _make_room(out: Path, restart: bool) -> None:
    """Remove what an earlier run has written here; without `restart` that is refused."""
    found = [path for path in out.glob("*/*") if _OUTPUT.fullmatch(path.name)]
    if found and not restart:
        raise DataError(f"{found[0]}: is there already, from another run; give another --output-dir or --restart")
    for path in found:
        path.unlink()
    for name in ("removed", "plots"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("report.json", "report.md"):
        (out / name).unlink(missing_ok=True)


def _stages(paths: list[str], out: Path, work: Path, tasks: int, reading: Reading, settings: Any) -> list[Any]:
    from megapoly.data.clean.dedup import DropDuplicates, dedup_stages, documents_reader
    from megapoly.data.clean.ledger import Ledger
    from megapoly.data.clean.report import WriteReport
    from megapoly.data.clean.stage import Stage
    from megapoly.data.clean.steps import CleanDocuments, RemovedAsDuplicates, WriteDocuments, WriteLanguages

    wanted = Wanted((reading.text_key,), reading.language_key, reading.skip_bad_lines, reading.limits)
    documents, dedup = work / "documents", work / "dedup"
    of_rules, of_output = work / "ledgers" / "rules", work / "ledgers" / "output"
    ledger = Ledger(settings.samples)
    stages = [Stage("rules", tasks, [CleanDocuments(paths, wanted, settings, of_rules), WriteDocuments(documents)])]
    last = [documents_reader(str(documents))]
    if settings.dedup is not None:
        stages += dedup_stages(str(documents), str(dedup), tasks, settings.dedup)
        last.append(DropDuplicates(str(dedup), tasks, RemovedAsDuplicates(ledger)))
    stages.append(Stage("output", tasks, [*last, WriteLanguages(out, ledger, of_output)]))
    report = WriteReport(out, [of_rules, of_output], tasks, settings.samples, [documents, dedup])
    return [*stages, Stage("report", 1, [report])]
