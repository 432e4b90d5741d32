"""Slurm and Ray: what would be submitted, and the submitted jobs run here by stand-ins for sbatch, srun and scontrol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_clean_corpus import document, files_of, write

from megapoly.data.clean.executors import ray_executor, refuse_incomplete, run_stages, slurm_executor
from megapoly.data.clean.machines import Machines, check_machines
from megapoly.data.clean.pipeline import clean_corpus, read_report
from megapoly.data.clean.stage import Stage
from megapoly.data.clean.steps import WriteDocuments
from megapoly.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
# sbatch runs what it is given at once, an array one index after the other.
SBATCH = """#!/bin/bash
script="${!#}"
cp "$script" "$JOBS/$(ls "$JOBS" | wc -l).sh"
echo "$*" >> "$JOBS.arguments"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
grep -q '^merge_stats' "$script" && last=-1  # which only adds up what datatrove prints
for i in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" >> "$JOBS.log" 2>&1 || exit 1
done
echo "Submitted batch job $(ls "$JOBS" | wc -l)"
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho here\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_jobs_of_slurm_make_what_one_machine_makes(slurm: Path) -> None:
    inputs = [
        write(slurm / "a.jsonl", [document("en", n) for n in (1, 2, 3, 1)]),
        write(slurm / "b.jsonl", [document("ko", 4)]),
    ]
    here, there, said = slurm / "here", slurm / "there", list[str]()
    clean_corpus(inputs, str(here), log=said.append)
    machines = Machines("slurm", workers=4, partition="cpu", time="01:30:00", gib_per_task=3, sbatch={"account": "me"})
    assert clean_corpus(inputs, str(there), machines=machines, log=said.append) is None
    assert files_of(here) == files_of(there) and len(files_of(here)) >= 4, (slurm / "jobs.log").read_text()
    scripts = [path.read_text() for path in sorted((slurm / "jobs").iterdir(), key=lambda p: int(p.stem))]
    first = scripts[0]
    for line in (
        "--partition=cpu",
        "--time=01:30:00",
        "--mem-per-cpu=3G",
        "--account=me",
        "--array=0-1%4",
        "--job-name=clean-rules",
    ):
        assert f"#SBATCH {line}\n" in first
    assert "qos" not in first and "launch_pickled_pipeline" in first and f"source {sys.prefix}/bin/activate" in first
    # Every array, and what datatrove merges statistics by, waits for an earlier job to succeed.
    arguments = (slurm / "jobs.arguments").read_text().splitlines()
    launched = [n for n, script in enumerate(scripts) if "launch_pickled_pipeline" in script]
    assert [("afterok" in arguments[n]) for n in launched] == [False] + [True] * (len(launched) - 1)
    assert any(line.startswith("report: job") for line in said)
    said.clear()
    assert clean_corpus(inputs, str(there), machines=machines, log=said.append) == read_report(there)
    assert said[-1] == "all of it is done already" and len(list((slurm / "jobs").iterdir())) == len(scripts)


def test_what_sbatch_refuses_is_one_line(slurm: Path) -> None:
    (slurm / "bin/sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match="stage rules: sbatch ended with status 1"):
        clean_corpus([write(slurm / "a.jsonl", [document("en", 1)])], str(slurm / "out"),
                     machines=Machines("slurm", partition="none"), log=lambda _: None)  # fmt: skip


def test_what_an_executor_lacks_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for machines, message in (
        (Machines("slurm"), "--partition"),
        (Machines("slurm", partition="cpu"), "no sbatch"),
        (Machines("slorm"), "must be one of local, slurm, ray"),
        (Machines(workers=0), "--workers"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_machines(machines)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install ray"):
        check_machines(Machines("ray"))


def test_executors_get_the_stage_and_the_means(tmp_path: Path) -> None:
    stage = Stage("rules", 7, [WriteDocuments(tmp_path)])
    machines = Machines("ray", workers=3, gib_per_task=5, partition="p")
    ray = ray_executor(stage, tmp_path, machines)
    assert (ray.tasks, ray.workers, ray.mem_per_cpu_gb, ray.cpus_per_task) == (7, 3, 5, 1)
    assert Path(ray.logging_dir.path) == tmp_path / "logs/rules" and ray.pipeline == stage.steps
    first = slurm_executor(stage, tmp_path, machines, None)
    second = slurm_executor(stage, tmp_path, machines, first)
    assert second.depends is first and (second.tasks, second.workers, second.partition) == (7, 3, "p")
    with pytest.raises(DataError, match=r"7 of 7 tasks failed; see .*logs/rules/logs/task_00000.log"):
        refuse_incomplete(ray, stage, tmp_path)


def test_a_task_that_fails_ends_the_stage_and_is_not_marked(tmp_path: Path) -> None:
    class Failing(WriteDocuments):
        def run(self, data, rank=0, world_size=1):
            if rank == 1:
                raise DataError("this one")
            return super().run([], rank, world_size)

    stages = [Stage("first", 3, [Failing(tmp_path / "d")]), Stage("second", 1, [WriteDocuments(tmp_path / "e")])]
    with pytest.raises(DataError, match="this one"):
        run_stages(stages, tmp_path, Machines(), lambda _: None)
    assert [p.name for p in (tmp_path / "logs/first/completions").iterdir()] == ["00000"]
    assert "this one" in (tmp_path / "logs/first/logs/task_00001.log").read_text() and not (tmp_path / "e").exists()


def test_nothing_is_printed_but_what_is_logged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [document("en", n) for n in range(4)])
    out = tmp_path / "out"
    found = subprocess.run([sys.executable, "tools/clean_corpus.py", "--input", path, "--output-dir", str(out), "--workers", "2"],
                           cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stderr == "" and "datatrove" not in found.stdout and "PIPELINE" not in found.stdout
    assert json.loads((out / "report.json").read_text())["all"]["kept"]["documents"] == 4


def test_a_cluster_of_ray_makes_what_one_machine_makes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    inputs = [
        write(tmp_path / "a.jsonl", [document("en", n) for n in (1, 2, 3, 1)]),
        write(tmp_path / "b.jsonl", [document("ko", 4)]),
    ]
    clean_corpus(inputs, str(tmp_path / "here"), log=lambda _: None)
    clean_corpus(inputs, str(tmp_path / "there"), machines=Machines("ray", gib_per_task=1), log=lambda _: None)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
