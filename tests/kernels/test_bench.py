"""The benchmarks: their formulas by hand, their judgement of rows, and that the scripts run (on the CPU, tiny)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.append(str(BENCH))

import attention  # noqa: E402
import formulas  # noqa: E402
import harness  # noqa: E402
import journal  # noqa: E402
import record  # noqa: E402
import results  # noqa: E402
import run as run_all  # noqa: E402
import step  # noqa: E402
import tune_attention  # noqa: E402
from results import Row, Target  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without a GPU")
CPU = harness.Machine(torch.device("cpu"), True, "")
HEAD = {"format": 1, "smoke": False, "gpu": "NVIDIA H200", "driver": "570", "clocks": None, "cuda": "13.0"}


def run(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=BENCH.parents[1], check=False)


# ----------------------------------------------------------------------------------------------------------- formulas


def test_bytes_of_norms() -> None:
    # bf16: four tensors of 3 x 5 x 2 bytes either way
    assert formulas.norm_bytes(3, 5, 2) == {"forward": 120, "backward": 120, "both": 240}
    # fp32 stream: branch 2 + residual 4 + normed 2 + residual 4; d_normed 2 + d_residual 4 + x 4 + dx 4 + d_branch 2
    assert formulas.norm_bytes(3, 5, 4) == {"forward": 15 * 12, "backward": 15 * 16, "both": 15 * 28}


def test_bytes_of_elementwise_operations() -> None:
    assert formulas.bias_gelu_bytes(2, 7) == {"forward": 56, "backward": 84, "both": 140}
    assert formulas.gated_bytes(2, 7) == {"forward": 84, "backward": 140, "both": 224}
    assert formulas.rotary_bytes(2, 7) == {"forward": 56, "backward": 56, "both": 112}
    assert formulas.cross_entropy_bytes(2, 7) == {"forward": 28, "backward": 56, "both": 84}
    assert formulas.adamw_bytes(1_700_000_000) == {"step": 51_000_000_000}


def test_flops() -> None:
    # scores and output: 2 products of 4 x 4 x 8 multiply-adds for each of 2 x 3 heads, half of them causal
    assert formulas.attention_flops(2, 3, 4, 8) == {"forward": 6 * 4 * 4 * 8 * 2, "backward": 3840, "both": 5376}
    assert formulas.linear_cross_entropy_flops(8192, 2048, 256000)["both"] == 25_769_803_776_000
    # PolyLM-1.7B: 7.25 (blocks) + 3.15 (logits) + 1.21 (attention) GFLOP a token
    full = formulas.step_flops_per_token(24, 2048, 256000, 2048, is_causal=False)
    assert full == 6 * 12 * 24 * 2048**2 + 6 * 256000 * 2048 + 12 * 24 * 2048 * 2048 == 11_601_444_864
    assert full - formulas.step_flops_per_token(24, 2048, 256000, 2048, is_causal=True) == 6 * 24 * 2048 * 2048


# --------------------------------------------------------------------------------------------------------------- rows


def row(implementation: str, ms: float | None, backend: str = "", direction: str = "forward", **more: Any) -> Row:
    return Row("op", "shape", direction, implementation, backend, ms=ms, **more)


def test_ratio_is_to_the_fastest_right_peer() -> None:
    rows = [
        row("megapoly triton", 2.0, "triton"),
        row("megapoly torch", 0.1, "torch"),
        row("slow peer", 6.0),
        row("peer", 3.0),
        row("wrong peer", 1.0, is_wrong=True),
        row("absent peer", None),
        row("another direction", 0.5, direction="backward"),
    ]
    results.add_ratios(rows)
    assert [r.ratio for r in rows] == [1.5, 30.0, 0.5, 1.0, 3.0, None, 1.0]


@pytest.mark.parametrize(
    ("target", "gpu", "values", "met", "reached"),
    [
        (Target("rate", 3.7, gpu="H200"), "NVIDIA H200", {"rate": 3.7}, True, None),
        (Target("rate", 3.7, gpu="H200"), "NVIDIA H200", {"rate": 3.69}, False, None),
        (Target("rate", 3.7, gpu="H200"), "NVIDIA H100 80GB HBM3", {"rate": 5.0}, None, None),
        (Target("rate", 340, 500), "any", {"rate": 400.0}, True, False),
        (Target("rate", 340, 500), "any", {"rate": 501.0}, True, True),
        (Target("rate", 340, 500), "any", {"rate": 501.0, "is_wrong": True}, False, False),
        (Target("percent", 85), "any", {"percent": 86.0}, True, None),
        (Target("ms", 42), "any", {}, None, None),
        (Target("extra_gb", 1.05), "any", {"extra_gb": 1.06}, False, None),
        (Target("extra_gb", 1.05), "any", {"extra_gb": 1.05}, True, None),
    ],
)
def test_targets(target: Target, gpu: str, values: dict[str, Any], met: bool | None, reached: bool | None) -> None:
    judged = row("megapoly triton", None, "triton", unit="TB/s", **values)
    judged.judge([target], gpu, smoke=False)
    assert (judged.targets[0]["met"], judged.targets[0]["reached"]) == (met, reached)
    smoke = row("megapoly triton", None, "triton", **values)
    smoke.judge([target], gpu, smoke=True)
    assert smoke.targets[0]["met"] is None


def test_a_target_speaks_of_its_direction() -> None:
    assert Target("rate", 3.7, gpu="H200").says("TB/s") == ">= 3.7 TB/s on H200"
    assert Target("ms", 42).says("TFLOP/s") == "<= 42 ms"


# ------------------------------------------------------------------------------------------------------ one contestant


def case(contestants: list[harness.Contestant], **options: Any) -> harness.Case:
    def make(seed: int) -> harness.Inputs:
        x = CPU.random(4, 8, seed=2 * seed, dtype=torch.float32).requires_grad_()
        return harness.Inputs([x], [CPU.random(4, 8, seed=2 * seed + 1, dtype=torch.float32)])

    return harness.Case(
        "square", "4 x 8", make, harness.by_autograd(lambda x: x * x), {"forward": 10, "backward": 20, "both": 30},
        "TB/s", contestants, **options,
    )  # fmt: skip


def contestant(function: Any, name: str = "peer", **options: Any) -> harness.Contestant:
    return harness.Contestant(name, lambda: lambda inputs: [function(*inputs.leaves)], **options)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2.2 * ctx.saved_tensors[0] * grads[0]


def test_errors_are_seen_in_their_direction() -> None:
    right, shifted, low, broken = harness.measure_case(
        case([contestant(lambda x: x * x), contestant(lambda x: x * x + 0.5), contestant(WrongGradient.apply),
              contestant(lambda x: x * x * torch.nan)], directions=("forward",)), CPU,
    )  # fmt: skip
    assert (right.error, right.is_wrong, low.is_wrong) == (0.0, False, False)
    assert shifted.is_wrong and shifted.error is not None and shifted.error > 0.03
    assert broken.is_wrong and broken.error is None and broken.note == "not finite"
    _, wrong = harness.measure_case(case([contestant(WrongGradient.apply)]), CPU)
    assert wrong.is_wrong and wrong.error == pytest.approx(0.1, rel=1e-3)
    json.dumps(results.document_of(HEAD, {}, [right, shifted, broken]), allow_nan=False)


def test_an_absent_or_failing_peer_is_a_row_with_its_reason() -> None:
    def absent() -> harness.Run:
        import no_such_package  # noqa: F401

        raise AssertionError

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("cannot\nat all")

    some = case([contestant(lambda x: x * x), harness.Contestant("absent", absent), contestant(fails, "fails")])
    rows = harness.measure_case(some, CPU)
    assert len(rows) == 6
    notes = {r.implementation: r.note for r in rows}
    assert notes == {
        "peer": "", "absent": "ModuleNotFoundError: No module named 'no_such_package'", "fails": "ValueError: cannot"
    }  # fmt: skip
    assert all((r.ms is None) == (r.implementation != "peer") for r in rows)


def test_a_backward_that_destroys_is_timed_by_difference() -> None:
    rows = harness.measure_case(
        case([contestant(lambda x: x * x, rebuilds=True)], directions=("forward", "backward", "both")), CPU
    )
    forward, backward, both = rows
    assert backward.timer == "less" and backward.ms == pytest.approx(both.ms - forward.ms)
    assert forward.rate == pytest.approx(10 / forward.ms / 1e9)


class DoubledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * grads[0]


def test_an_operation_may_change_its_input_in_place_again_and_again() -> None:
    x = torch.ones(3, requires_grad=True)
    for expected in (2.0, 4.0, 8.0):
        y = DoubledInPlace.apply(attention.Alias.apply(x))
        assert y.tolist() == [expected] * 3 and y.data_ptr() == x.data_ptr()
        assert torch.autograd.grad(y, x, torch.ones(3))[0].tolist() == [2.0] * 3


def test_compiled_peers_can_be_differentiated_repeatedly() -> None:
    function = harness.compile_for_backward(lambda x: x.sin().exp(), "aot_eager")
    x = torch.ones(3, requires_grad=True)
    y = function(x)
    first, second = (torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------- what hangs or loses the GPU


def test_a_restart_leaves_out_what_is_known_and_what_ended_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = case([contestant(lambda x: x * x, name) for name in "abc"], directions=("forward",))
    first = journal.Journal(tmp_path / "part.json", "op", HEAD)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(harness, "_free", lambda machine: 1 / 0)
        harness.measure_case(some, CPU, first)
    with first.measuring([Row("square", "4 x 8", "forward", "b")], 0):  # the process ends here
        pass
    a, b, c = harness.measure_case(some, CPU, journal.Journal(tmp_path / "part.json", "op", HEAD, resume=True))
    assert a.ms == first.rows[0].ms and b.note.startswith("did not finish") and b.ms is None and c.ms and a.ratio


FAKE = """
import json, os, signal, sys
file = sys.argv[sys.argv.index("--json") + 1]
rows = json.load(open(file))["rows"] if os.path.exists(file) else []
rows.append(dict(operation="op", shape="s", direction="forward", implementation=str(len(rows)), ms=1.0))
json.dump({"operations": {"NAME": {"failed": None}}, "rows": rows}, open(file, "w"))
"""
FATES = ("sys.exit(3 * (len(rows) < 3))", "signal.pause()", "os.remove(file); sys.exit('trouble')")


def test_run_starts_a_script_again_while_it_comes_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setattr(run_all, "LEAST", 0.1)
    options = run_all.argparse.Namespace(limit=9.0, smoke=True, quick=False, timeout=1.5)
    collected = run_all.Collected(tmp_path / "all.json", HEAD)
    for name, fate in zip(("lost", "stuck", "broken"), FATES, strict=True):
        (tmp_path / f"{name}.py").write_text(FAKE.replace("NAME", name) + fate)
        run_all.run_one(name, tmp_path, collected, options, deadline=1e12)
    run_all.run_one("late", tmp_path, collected, options, deadline=0.0)
    document = json.loads((tmp_path / "all.json").read_text())
    failed = [told["failed"] for told in document["operations"].values()]
    assert failed == [None, "not finished in its time", "exit status 1: trouble", "no time was left for it"]
    assert [r["operation"] for r in document["rows"]] == ["op", "op", "op", "op", "stuck", "broken", "late"]


def test_quick_keeps_targets_and_compiles_once() -> None:
    both = [contestant(lambda x: x * x, name) for name in ("torch.compile", "peer")]
    aimed = case(both, targets={"forward": [Target("percent", 85)]})
    kept = harness.selected([case(both), aimed, aimed], quick=True)
    assert [[c.name for c in some.contestants] for some in kept] == [["torch.compile", "peer"], ["peer"]]


@pytest.mark.parametrize("kernel", tune_attention.KERNELS)
def test_tiles_are_replaced_for_one_kernel(kernel: str) -> None:
    own, some = tune_attention.own_tiles, tune_attention.candidates(kernel, 90, 128)
    before = {name: own(name, 90, 128) for name in tune_attention.KERNELS}
    assert some[0] == before[kernel] and 20 < len(some) == len(set(some))
    with tune_attention.only(kernel, some[-1]):  # and no other kernel's
        assert {name: own(name, 90, 128) for name in before} == before | {kernel: some[-1]}


# ------------------------------------------------------------------------------------------------------------- record


def measured(choice: str, backend: str, shape: str, forward: float | None, backward: float | None) -> list[Row]:
    return [
        Row("op", shape, direction, f"megapoly {backend}", backend, choice, ms=ms)
        for direction, ms in (("forward", forward), ("backward", backward))
    ]


def test_record_takes_the_fastest_that_ran_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *measured("norm", "triton", "a", 1.0, 2.0), *measured("norm", "triton", "b", 1.0, 2.0),
        *measured("norm", "torch", "a", 0.1, 0.1), *measured("norm", "torch", "b", None, None),
        *measured("norm", "apex", "a", 0.5, 1.0), *measured("norm", "apex", "b", 0.5, 1.0),
        *measured("attention", "triton", "a", 1.0, 4.0), *measured("attention", "sdpa", "a", 2.0, 1.0),
        Row("op", "a", "forward", "peer", ms=1e-6, record="norm"), Row("op", "b", "forward", "peer", record="norm"),
        *[Row("op", "a", "both", f"megapoly {b}", b, "loss", ms=ms, is_wrong=b == "torch")
          for b, ms in (("fused_linear", 3.0), ("triton", 2.0), ("torch", 1.0))],
    ]  # fmt: skip
    file, table = tmp_path / "h200.json", tmp_path / "measured.json"
    results.write_json(file, results.document_of(HEAD, {}, rows))
    table.write_text('{"NVIDIA A100": {"norm": "torch"}, "NVIDIA H200": {"adamw": "torch", "norm": "torch"}}')
    assert record.main([str(file), "--measured", str(table)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(table.read_text()) == {
        "NVIDIA A100": {"norm": "torch"},
        "NVIDIA H200": {"adamw": "torch", "attention": "sdpa", "loss": "triton", "norm": "triton"},
    }
    assert "norm triton (was: torch)" in printed and "apex is 2.00 times as fast" in printed
    assert "activation: no implementation ran at every shape" in printed


@pytest.mark.parametrize(
    "change", [{"smoke": True}, {"gpu": "no GPU (x86_64)"}, {"format": 0}, {"driver": None, "cuda": None}]
)
def test_record_refuses_what_was_not_measured(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "result.json", tmp_path / "measured.json"
    table.write_text("{}")
    file.write_text(json.dumps(results.document_of(HEAD | change, {}, measured("norm", "triton", "a", 1.0, 1.0))))
    assert record.refusal(json.loads(file.read_text()))
    assert record.main([str(file), "--measured", str(table)]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert table.read_text() == "{}"


def test_a_smoke_result_is_not_kept_among_the_results() -> None:
    with pytest.raises(ValueError, match="measures nothing"):
        results.write_json(results.FOLDER / "smoke.json", HEAD | {"smoke": True})
    assert not (results.FOLDER / "smoke.json").exists()
    assert results.default_path("NVIDIA H200").name.startswith("nvidia-h200-20")


# -------------------------------------------------------------------------------------------------------- the scripts


@NO_GPU
@pytest.mark.parametrize("script", ["run.py", "step.py", "tune_attention.py"])
def test_without_a_gpu_one_line_and_status_2(script: str) -> None:
    done = run(script)
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.count("\n") == 1 and "needs a CUDA GPU" in done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A smoke run of all operations: its document and what it printed."""
    file = tmp_path_factory.mktemp("bench") / "all.json"
    before = set(results.FOLDER.glob("*"))
    done = run("run.py", "--smoke", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(results.FOLDER.glob("*")) == before
    return json.loads(file.read_text()), done.stdout


def test_smoke_covers_every_operation(smoke: tuple[dict[str, Any], str]) -> None:
    document, printed = smoke
    assert document["smoke"] is True and document["gpu"].startswith("no GPU")
    assert {"format", "driver", "clocks", "cuda", "torch", "triton", "python", "command", "date"} <= document.keys()
    assert len(document["operations"]) == 7
    for told in document["operations"].values():
        assert told["failed"] is None and told["copy_tb_per_s"] > 0 and told["gemm_tflop_per_s"] > 0
    ours = [r for r in document["rows"] if r["backend"]]
    assert {r["operation"] for r in ours} == {
        "layer norm", "rms norm", "rotary", "attention", "attention + rotary", "bias gelu", "swiglu", "cross entropy",
        "linear + cross entropy", "adamw",
    }  # fmt: skip
    assert "megapoly torch" in printed and "Liger-Kernel" in printed and "WRONG" not in printed


def test_smoke_rows_are_whole(smoke: tuple[dict[str, Any], str]) -> None:
    for r in smoke[0]["rows"]:
        name = f"{r['operation']} {r['direction']} {r['implementation']}"
        if r["ms"] is None:
            assert r["note"] and (not r["backend"] or r["backend"] == "apex"), f"{name}: {r['note']}"
            continue
        assert r["ms"] > 0 and r["rate"] > 0 and r["percent"] > 0, name
        assert r["error"] < 0.03 and not r["is_wrong"], name
        peers = [
            other["ms"] for other in smoke[0]["rows"]
            if not other["backend"] and other["ms"]
            and all(other[key] == r[key] for key in ("operation", "shape", "direction"))
        ]  # fmt: skip
        assert r["ratio"] == (pytest.approx(min(peers) / r["ms"]) if peers else None), name
        assert all(target["met"] is None for target in r["targets"]), name


def test_record_refuses_the_smoke_run(smoke: tuple[dict[str, Any], str]) -> None:
    assert record.refusal(smoke[0]) == "is a smoke run, which measures nothing"


def test_smoke_of_the_training_step(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    done = run("step.py", "--smoke", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["smoke"] is True and record.refusal(document)
    steps = {told["implementation"]: told for told in document["steps"]}
    assert list(steps) == list(step.IMPLEMENTATIONS)
    for name in ("megapoly", "transformers eager"):
        told = steps[name]
        assert told["step_ms"] > 0, told["note"]
        assert told["tokens_per_second"] == pytest.approx(1e3 * 2 * 32 / told["step_ms"])
        assert abs(told["loss"] - 6.24) < 0.3  # ln 512: nothing is learnt from random tokens
        assert told["mfu"] is None
    assert "a smoke run compiles nothing" in steps["transformers compile"]["note"]


def test_an_implementation_that_cannot_run_says_why() -> None:
    options = step.argparse.Namespace(smoke=True, backend=["attention=nonsense"], steps=1, warmup=0)
    told = step.run_here("megapoly", options, step.Sizes(2, 64, 4, 512, 32, 2))
    assert "nonsense" in told["note"] and "step_ms" not in told
