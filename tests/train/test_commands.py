"""The commands as a user types them: torchrun, bash, two agents; and what bad input ends in."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megapoly.config import load_config
from megapoly.data.corpus import prepare_corpus
from megapoly.train.main import provide_corpus

ROOT = Path(__file__).parent.parent.parent
SMALL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --train-iters 3 --no-tensorboard".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the examples, prepared once."""
    folder = tmp_path_factory.mktemp("data")
    prepare_corpus([str(path) for path in sorted((ROOT / "examples/data").glob("*.jsonl"))], str(folder))
    return folder


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


def flags(data: Path, run_dir: str) -> list[str]:
    return ["--data-root", str(data), "--run-dir", run_dir, *SMALL]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", ["pretrain_polylm", "pretrain_polyglot_ko", "pretrain_gecko"])
def test_torchrun_starts_the_script_and_a_second_start_knows_that_it_is_finished(
    script: str, data: Path, tmp_path: Path
) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(ROOT / f"examples/{script}.sh")]
    first = run([*command, *flags(data, "run")], tmp_path)
    assert first.returncode == 0, first.stderr
    assert "no --config given: " in first.stdout and "tiny" in first.stdout
    assert first.stdout.count("kernels: attention sdpa, norm torch") == 1
    assert first.stdout.count("host: 2 ranks on ") == 1
    assert "TP 1 x PP 1 x DP 2" in first.stdout and "starting run anew" in first.stdout
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000003\n"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["num_layers"] == 2
    assert len(losses(tmp_path / "run")) == 3
    again = run([*command, *flags(data, "run")], tmp_path)
    assert again.returncode == 0 and "is finished (3 steps)" in again.stdout


def test_a_fresh_folder_prepares_the_corpus_of_the_examples_once(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(ROOT / "examples/pretrain_polylm.sh")]
    done = run([*command, "--run-dir", "run", *SMALL], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preparing ") == 1 and "held-out loss" in done.stdout
    assert (tmp_path / "data/tiny/manifest.json").is_file()


def test_the_first_rank_to_come_prepares_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = []
    for local_rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        provide_corpus("tiny", load_config("tiny"), ROOT / "examples/data")
        said.append(capsys.readouterr().out)
    assert said[0].count("preparing ") == 1 and said[1] == ""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_end_with_their_launcher(data: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(ROOT / "examples/pretrain_polylm.sh")]
    words = ["--config", "tiny", "--data-root", str(data), "--run-dir", "run", "--eval-iters", "1"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen([*command, *words], cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.time() + 60
        while "step   3/" not in (tmp_path / "log").read_text():
            assert time.time() < deadline and launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        workers = children(launcher.pid)
        assert len(workers) == 2
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < deadline, "a worker outlived its launcher"
        time.sleep(0.2)


FLIPS_A_BIT = """
import pathlib, torch
from megapoly.train import loop, main
train_step = loop.train_step

def flips(run, step):
    stats = train_step(run, step)
    run.buffers.wait_params()
    if step == 2 and run.mesh.world.rank == 1:
        run.buffers.params.view(torch.uint8)[5] ^= 8
    return stats

loop.train_step = flips
main.main("tiny", "tiny", pathlib.Path("none"))
"""


def test_a_flipped_bit_ends_the_job_with_the_rank_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "flips.py").write_text(FLIPS_A_BIT)
    words = [*flags(data, "run"), "--global-batch-size", "6", "--check-weight-hash-across-dp-replicas-interval", "2"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "3", "flips.py", *words]
    done = run(command, tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")
    assert done.returncode != 0 and "exitcode  : 2 " in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert (
        len(errors) == 1 and "after step 2 rank 1 differs from most of the 3 ranks that hold the same in" in errors[0]
    )
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_bash_starts_the_same_file(data: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(["bash", str(ROOT / "examples/pretrain_polylm.sh"), *flags(data, "run")], tmp_path, NPROC="2", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "DP 2" in done.stdout and len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        ("pretrain_polylm", ["--tensor-model-parallel-size", "3"], "tensor_model_parallel_size (3) must divide"),
        ("pretrain_gecko", ["--config", "nope.yaml"], "config 'nope.yaml' is neither a file nor a preset"),
    ],
)
def test_a_mistake_under_bash_is_one_line_and_status_2(
    script: str, wrong: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / f"examples/{script}.sh"), *flags(data, "run"), *wrong]
    done = run(command, tmp_path, NPROC="2", PATH=path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize(
    ("code", "status", "reports"),
    [
        ("os._exit(75)", 75, False),
        ("os._exit(2) if rank else time.sleep(60)", 2, False),
        ("time.sleep(60) if rank else os._exit(141)", 141, False),
        ("os._exit(3) if rank else time.sleep(60)", 1, True),
        ("os.kill(os.getpid(), 9) if rank else time.sleep(60)", 1, True),
    ],
)
def test_only_what_a_rank_has_said_itself_is_passed_on_in_silence(
    code: str, status: int, reports: bool, tmp_path: Path
) -> None:
    # Without the others' wait for the one that speaks, to which torchrun sends SIGTERM.
    (tmp_path / "rank.py").write_text(f"import os, time\nrank = int(os.environ['RANK'])\n{code}\n")
    command = [sys.executable, "-m", "megapoly.train.launch", "--standalone", "--nproc-per-node", "2", "rank.py"]
    done = run(command, tmp_path)
    assert (done.returncode, "ChildFailedError" in done.stderr) == (status, reports), done.stderr
    assert reports or done.stderr == ""


def test_two_agents_train_as_one(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    agents = [
        subprocess.Popen(
            [
                *TORCHRUN,
                "--nnodes",
                "2",
                "--node-rank",
                str(rank),
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                f"127.0.0.1:{port}",
                "--nproc-per-node",
                "2",
                str(ROOT / "examples/pretrain_polylm.sh"),
                "--config",
                "tiny",
                *flags(data, "two"),
                *layout,
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for agent in agents:
            _, errors = agent.communicate(timeout=120)
            assert agent.returncode == 0, errors
    finally:
        for agent in agents:
            agent.kill()
    alone = run([sys.executable, str(ROOT / "examples/pretrain_polylm.sh"), *flags(data, "one")], tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_dry_run_prints_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples/pretrain_polylm.sh")]
    done = run([*script, "--dry-run", *flags(data, "run")], tmp_path)
    assert done.returncode == 0 and "parameters: " in done.stdout and "stage1" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("memory a rank: "))
    whole, *parts = (float(number) for number in re.findall(r"\d\.\d+", line))
    assert len(parts) == 4 and min(parts) > 0 and whole == pytest.approx(sum(parts), rel=0.02), line
    assert not (tmp_path / "run").exists()
    assert "tied matrix" not in done.stdout


def test_dry_run_counts_the_copy_of_a_tied_matrix(data: Path, tmp_path: Path) -> None:
    """bf16 and an fp32 gradient: 6 bytes of each of 2,048 x 4,096 entries on one of two tensor-parallel ranks."""
    script = [sys.executable, str(ROOT / "examples/pretrain_polylm.sh"), "--dry-run", "--bf16"]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--pipeline-vocab-parallel"]
    sizes = ["--vocab-size", "4096", "--hidden-size", "4096"]
    done = run([*script, *flags(data, "run"), *layout, *sizes], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "copy of the tied matrix 0.0469)" in done.stdout


def bad_file(data: Path, folder: Path, damage: str) -> list[str]:
    """Copy the data and damage one file of it; returns the flags that use it."""
    shutil.copytree(data, folder / "data")
    idx, binary = folder / "data/ko_text_document.idx", folder / "data/ko_text_document.bin"
    if damage == "missing":
        idx.unlink()
    elif damage == "truncated":
        idx.write_bytes(idx.read_bytes()[:-5])
    elif damage == "lies":
        content = bytearray(idx.read_bytes())
        content[18:26] = (10**15).to_bytes(8, "little")
        idx.write_bytes(content)
    elif damage == "id":
        content = bytearray(binary.read_bytes())
        content[10:12] = (60000).to_bytes(2, "little")
        binary.write_bytes(content)
    return ["--data-root", str(folder / "data")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("key", "unknown key 'num_layer'; did you mean 'num_layers'"),
        ("flag", "unknown flag --micro-batch-sise; did you mean 'micro-batch-size'"),
        ("heads", "tensor_model_parallel_size (2) must divide num_attention_heads (3)"),
        ("layers", "= 4 stages are too many for num_layers (1): only the first and the last may have none; pipeline_m"),
        (
            "world",
            "tensor_model_parallel_size (4) x pipeline_model_parallel_size (1) = 4 must divide the world size (2)",
        ),
        ("backend", "norm_backend (triton) needs a CUDA GPU; this is the CPU: use auto"),
        ("missing", "ko_text_document.idx"),
        ("truncated", "ko_text_document.idx"),
        ("lies", "ko_text_document.idx"),
        ("id", "ko_text_document.bin"),
        ("tokenizer", "tokenizer.model"),
        ("checkpoint", "hidden_size is 64 there and 128 in this run"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_on_every_rank(
    name: str, message: str, data: Path, tmp_path: Path
) -> None:
    script = [sys.executable, str(ROOT / "examples/pretrain_polylm.sh")]
    words = ["--config", "tiny", "--data-root", str(data), "--run-dir", "run", *SMALL]
    if name == "key":
        (tmp_path / "bad.yaml").write_text("model: {num_layer: 3}")
        words[1] = "bad.yaml"
    elif name == "flag":
        words += ["--micro-batch-sise", "2"]
    elif name == "heads":
        words += ["--num-attention-heads", "3", "--hidden-size", "96", "--tensor-model-parallel-size", "2"]
    elif name == "layers":
        words += ["--num-layers", "1", "--pipeline-model-parallel-size", "4"]
    elif name == "world":
        words += ["--tensor-model-parallel-size", "4"]
    elif name == "backend":
        words += ["--norm-backend", "triton"]
    elif name == "tokenizer":
        words += ["--tokenizer-model", "tokenizer.model"]
    elif name == "checkpoint":
        assert run([*script, *words], tmp_path).returncode == 0
        words += ["--hidden-size", "128"]
    else:
        words += bad_file(data, tmp_path, name)
    ranks = [
        subprocess.Popen(
            [*script, *words],
            cwd=tmp_path,
            env=os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    _, errors = ranks[0].communicate(timeout=30)
    assert ranks[0].returncode == 2
    assert errors.count("\n") == 1 and errors.startswith("error: ") and message in errors, errors
    time.sleep(2)
    assert ranks[1].poll() is None, "a rank that left first would have the launcher end the one that speaks"
    ranks[1].terminate()  # as the launcher does when it sees the first rank gone
    _, errors = ranks[1].communicate(timeout=30)
    assert (ranks[1].returncode, errors) == (2, "")


def test_torchrun_ends_too(data: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(ROOT / "examples/pretrain_polylm.sh")]
    done = run([*command, *flags(data, "run"), "--tensor-model-parallel-size", "3"], tmp_path)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: tensor_model_parallel_size (3) must divide") == 1
    assert "exitcode  : 2" in done.stderr
