"""A run that has saved remembers it in its directory, so that a start that finds no checkpoint tells why not."""

from pathlib import Path

from megapoly.checkpoint.folders import roots_of
from megapoly.errors import ConfigError
from megapoly.sections import Config
from megapoly.train.prepare import Prepared, own_checkpoints
from megapoly.train.rows import rows_of


def _record(cfg: Config) -> Path:
    return Path(cfg.logging.run_dir) / "saved_to"


def remember_saves(cfg: Config) -> None:
    """Write down where checkpoints of the run are, once there is one; the main rank calls it. Raises OSError."""
    text = "".join(f"{root.absolute()}\n" for root in roots_of(cfg.checkpoint))
    record = _record(cfg)
    if own_checkpoints(cfg) and not (record.is_file() and record.read_text(encoding="utf-8") == text):
        record.write_text(text, encoding="utf-8")


def forget_saves(cfg: Config) -> None:
    """A run that begins anew has saved nothing; the main rank calls it."""
    _record(cfg).unlink(missing_ok=True)


def check_not_lost(prepared: Prepared) -> None:
    """Refuse to begin anew over the rows of a run that has saved, where none of its checkpoints is found.

    A run that was killed before its first save has none, and begins anew.
    """
    cfg, record = prepared.cfg, _record(prepared.cfg)
    if prepared.is_resume or not record.is_file():
        return
    path = Path(cfg.logging.run_dir) / "metrics.jsonl"
    last = max((row["step"] for row in rows_of(path)), default=0)
    if last:
        where = record.read_text(encoding="utf-8", errors="replace")[:400].split("\n")[0]
        raise ConfigError(
            f"{path} has rows up to step {last}, and checkpoints were saved to {where!r}, but none is in "
            f"{cfg.checkpoint.save}: give --save, mount what is missing, take another --run-dir, or remove "
            "metrics.jsonl to begin anew"
        )
