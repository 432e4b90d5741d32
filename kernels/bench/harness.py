"""How an operation is measured: cases, contestants, and the main function that the scripts share.

Data is random, and there are so many copies of it that no call finds its inputs in the L2 cache.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from journal import LOST, GpuLost, Journal
from results import LeftOut, Row, Target, add_ratios, environment, first_line, table, target_table
from timing import Machine, this_machine, time_calls
from torch import Tensor

for _root in (Path(__file__).parents[1], Path(__file__).parents[2]):
    if str(_root) not in sys.path:  # a script also runs without PYTHONPATH
        sys.path.append(str(_root))

NO_GPU = 2
QUICK = "the shapes that have targets alone, and torch.compile once an operation"


@dataclass
class Inputs:
    """One copy of an operation's data: what gradients are taken of, the outputs' gradients, and everything else."""

    leaves: list[Tensor]
    grads: list[Tensor] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)


Run = Callable[[Inputs], Sequence[Tensor]]
Pair = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Contestant:
    """An implementation. `build` imports it and returns the call; what it raises becomes the row's note.

    `prepare` brings a copy into its layout and `restore` brings outputs and gradients back, both outside the clock.
    `rebuilds`: its backward destroys what it read, so that backward is timed as forward + backward less forward.
    """

    name: str
    build: Callable[[], Run]
    backend: str = ""
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    restore: Callable[[list[Tensor], list[Tensor]], Pair] = lambda outputs, grads: (outputs, grads)
    rebuilds: bool = False


@dataclass(frozen=True)
class Case:
    """An operation at a shape. `work` is bytes or FLOPs (`unit` TB/s or TFLOP/s) of each direction that is timed.

    `reference` returns outputs and gradients in fp32 for copy 0; `part` takes what it covers of a contestant's.
    Targets, by direction, hold for the contestant whose backend is `under_test`.
    """

    operation: str
    shape: str
    make: Callable[[int], Inputs]
    reference: Callable[[Inputs], Pair]
    work: Mapping[str, int]
    unit: str
    contestants: Sequence[Contestant]
    directions: tuple[str, ...] = ("forward", "backward")
    targets: Mapping[str, Sequence[Target]] = field(default_factory=dict)
    under_test: str = "triton"
    record: str = ""
    part: Callable[[Tensor], Tensor] = lambda x: x
    measures_memory: bool = False
    tolerance: float = 3e-2


# ------------------------------------------------------------------------------------------------- one implementation


def by_autograd(function: Callable[..., Sequence[Tensor] | Tensor]) -> Callable[[Inputs], Pair]:
    """A reference from a function of the leaves in fp32: outputs, and gradients by autograd."""

    def reference(inputs: Inputs) -> Pair:
        leaves = [leaf.detach().float().requires_grad_() for leaf in inputs.leaves]
        outputs = function(*leaves, **inputs.other)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = torch.autograd.grad(outputs, leaves, [grad.to(o.dtype) for grad, o in zip(inputs.grads, outputs)])  # noqa: B905
        return [output.detach() for output in outputs], list(grads)

    return reference


def compiled(function: Callable[..., Any], machine: Machine) -> Callable[..., Any]:
    """torch.compile of a function for one shape, whose backward can be called again."""
    if machine.smoke:
        raise LeftOut("a smoke run compiles nothing")
    return compile_for_backward(function, "inductor")


def compile_for_backward(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """torch.compile without the buffers that a first backward gives away."""
    import torch._dynamo
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]  # backward is called repeatedly
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend=backend)


def backward(outputs: Sequence[Tensor], inputs: Inputs, retain: bool) -> Sequence[Tensor]:
    """Gradients of the leaves."""
    return torch.autograd.grad(list(outputs), inputs.leaves, inputs.grads, retain_graph=retain)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor], part: Callable[[Tensor], Tensor]) -> float:
    """The largest difference, over the largest entry of its tensor; infinite where something is not finite."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        difference = (part(a.detach()).float() - e).abs().max().item()
        worst = max(worst, difference / max(e.abs().max().item(), 1e-30)) if math.isfinite(difference) else math.inf
    return worst


def _errors(case: Case, contestant: Contestant, run: Run, expected: Pair) -> dict[str, float]:
    inputs = contestant.prepare(case.make(0))
    outputs = list(run(inputs))
    if "step" in case.directions:
        return {"step": relative_error(contestant.restore(outputs, [])[0], expected[0], case.part)}
    # The backward may overwrite what the outputs lie in.
    held = [output.detach().clone() for output in outputs]
    outputs, grads = contestant.restore(held, list(backward(outputs, inputs, retain=False)))
    errors = {
        "forward": relative_error(outputs, expected[0], case.part),
        "backward": relative_error(grads, expected[1], case.part),
    }
    return errors | {"both": max(errors.values())}


def _milliseconds(case: Case, contestant: Contestant, run: Run, machine: Machine) -> dict[str, tuple[float, str]]:
    """Time of each direction, with the timer it was taken by."""
    first = contestant.prepare(case.make(0))
    size = sum(t.numel() * t.element_size() for t in [*first.leaves, *_tensors(first.other)])
    count = max(1, min(32, math.ceil(2 * machine.l2_bytes / size))) if machine.l2_bytes else 2
    copies = [first] + [contestant.prepare(case.make(seed)) for seed in range(1, count)]
    clock = partial(time_calls, machine=machine)
    taken: dict[str, tuple[float, str]] = {}
    needed = set(case.directions)
    if contestant.rebuilds and "backward" in needed:
        needed = (needed - {"backward"}) | {"forward", "both"}
    for direction in ("step", "forward", "backward", "both"):
        if direction not in needed:
            continue
        if direction == "both":
            calls = [partial(lambda c: backward(run(c), c, retain=False), c) for c in copies]
        elif direction == "backward":
            calls = [partial(backward, run(c), c, retain=True) for c in copies]
        else:
            calls = [partial(run, c) for c in copies]
        taken[direction] = clock(calls)
        del calls
    if contestant.rebuilds and "backward" in case.directions:
        taken["backward"] = (taken["both"][0] - taken["forward"][0], "less")
    return taken


def _tensors(values: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]


def _extra_gigabytes(case: Case, contestant: Contestant, run: Run) -> float:
    """Peak memory of forward and backward beyond inputs and gradients."""
    inputs = contestant.prepare(case.make(0))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = backward(run(inputs), inputs, retain=False)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in grads)) / 1e9


def blank_rows(case: Case, contestant: Contestant) -> dict[str, Row]:
    """A row for each direction, with nothing measured."""
    names = {"operation": case.operation, "shape": case.shape, "implementation": contestant.name}
    return {
        direction: Row(direction=direction, backend=contestant.backend, record=case.record, unit=case.unit, **names)
        for direction in case.directions
    }


def measure(case: Case, contestant: Contestant, expected: Pair, machine: Machine) -> list[Row]:
    """The rows of one contestant; where it is absent or fails they say why."""
    rows = blank_rows(case, contestant)
    try:
        run = contestant.build()
        errors = _errors(case, contestant, run, expected)
        taken = _milliseconds(case, contestant, run, machine)
        extra = _extra_gigabytes(case, contestant, run) if case.measures_memory and not machine.smoke else None
    except Exception as error:  # whatever a peer raises costs its rows and no others
        for row in rows.values():
            row.note = first_line(error)
    else:
        for direction, row in rows.items():
            row.ms, row.timer = taken[direction]
            row.error, row.extra_gb = errors[direction], extra
            row.is_wrong = not row.error <= case.tolerance
            if not math.isfinite(row.error):
                row.error, row.note = None, "not finite"
            row.rate = case.work[direction] / row.ms / 1e9 if row.ms > 0 else None
            row.percent_of = "copy" if case.unit == "TB/s" else "gemm"
            peak = machine.copy_tb_per_s if case.unit == "TB/s" else machine.gemm_tflop_per_s
            row.percent = 100 * row.rate / peak if row.rate and peak else None
    for direction, row in rows.items():
        if contestant.backend and contestant.backend == case.under_test:
            row.judge(case.targets.get(direction, ()), machine.gpu, machine.smoke)
    return list(rows.values())


def measure_case(case: Case, machine: Machine, journal: Journal | None = None, limit: float = 0) -> list[Row]:
    """All contestants of a case, with ratios; rows are sorted by direction. Raises GpuLost, with the journal whole."""
    journal = journal or Journal(None, "", {})
    rows = journal.rows_of(case.operation, case.shape, "reference")
    if rows:
        return rows
    waiting = []
    for contestant in case.contestants:
        known = journal.rows_of(case.operation, case.shape, contestant.name)
        rows += known
        waiting += [] if known else [contestant]
    expected: Pair = ([], [])
    try:
        if waiting:
            expected = case.reference(case.make(0))
    except Exception as error:  # with nothing to hold them against, no contestant runs
        names = {"operation": case.operation, "shape": case.shape, "record": case.record}
        note = f"no reference: {first_line(error)}"
        journal.add([Row(direction=d, implementation="reference", note=note, **names) for d in case.directions])
        rows, waiting = rows + journal.rows[-len(case.directions) :], []
        _free(machine)
    for contestant in waiting:
        with journal.measuring(list(blank_rows(case, contestant).values()), limit):
            some = measure(case, contestant, expected, machine)
        journal.add(some)
        rows += some
        _free(machine)
    rows.sort(key=lambda row: case.directions.index(row.direction))
    add_ratios(rows)
    return rows


def _free(machine: Machine) -> None:
    gc.collect()
    if machine.device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # an illegal access, for one, ends all use of the GPU by this process
            raise GpuLost(first_line(error)) from None


# -------------------------------------------------------------------------------------------------------- the scripts


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", "--output", type=Path, help="write the rows to this file, as they come")
    parser.add_argument("--smoke", action="store_true", help="run on the CPU at tiny sizes; measures nothing")
    return parser


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that say how much is measured, of the scripts and of run.py."""
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--limit", type=float, default=90, help="seconds that one implementation at one shape may take")


def is_runnable(smoke: bool) -> bool:
    """Whether there is a GPU to measure on, or a smoke run was asked for; says so where not."""
    if smoke or torch.cuda.is_available():
        return True
    print(f"{Path(sys.argv[0]).name}: needs a CUDA GPU, and torch finds none here; --smoke runs it on the CPU")
    return False


def selected(cases: Sequence[Case], quick: bool) -> Sequence[Case]:
    """All cases; with `quick` those with targets, and torch.compile in the first of each operation."""
    if not quick:
        return cases
    kept: list[Case] = []
    for case in cases:
        if not any(case.targets.values()):
            continue
        if case.operation in {earlier.operation for earlier in kept}:
            some = [contestant for contestant in case.contestants if not contestant.name.startswith("torch.compile")]
            case = replace(case, contestants=some)
        kept.append(case)
    return kept


def main(name: str, parser: argparse.ArgumentParser, cases: Callable[[Machine, Any], Sequence[Case]]) -> int:
    """Measure the cases of a script, print them and write them; the exit status."""
    add_limits(parser)
    parser.add_argument("--resume", action="store_true", help="leave out what the --json file holds already")
    options = parser.parse_args()
    if not is_runnable(options.smoke):
        return NO_GPU
    machine = this_machine(options.smoke)
    print(
        f"{name}: copy {machine.copy_tb_per_s:.3g} TB/s, bf16 GEMM {machine.gemm_tflop_per_s:.4g} TFLOP/s"
        f"{' (smoke run: figures mean nothing)' if options.smoke else f', {machine.gpu}'}"
    )
    journal = Journal(options.json, name, environment(options.smoke), options.resume)
    journal.told |= {"copy_tb_per_s": machine.copy_tb_per_s, "gemm_tflop_per_s": machine.gemm_tflop_per_s}
    rows: list[Row] = []
    try:
        for case in selected(cases(machine, options), options.quick):
            some = measure_case(case, machine, journal, options.limit)
            print(table(some), flush=True)
            rows += some
    except GpuLost as error:
        print(f"{name}: this process has lost the GPU; --resume goes on without what did it\n{error}", file=sys.stderr)
        return LOST
    print(target_table(rows), flush=True)
    journal.rows = rows  # sorted, and with ratios
    journal.write(rows)
    return 0
