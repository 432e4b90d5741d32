"""Tile sizes of attention's kernels, tried out: python kernels/bench/tune_attention.py --head-dim 128 --length 4096

For each kernel (forward, keys and queries of the backward) a list of tiles is compiled ahead by other processes, held
against torch's SDPA and timed alone. What wins goes by hand into forward_tiles and backward_tiles.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import NO_GPU, arguments, environment, is_runnable, relative_error
from megapoly_kernels import HeadShape, Sequences, attention_backward, attention_forward, rotary_table
from megapoly_kernels.attention_backward import launch_backward
from megapoly_kernels.attention_forward import Tiles, launch_forward
from megapoly_kernels.rotary_attention import rotary_attention_reference
from results import first_line, write_json
from timing import Machine, time_calls
from torch import Tensor

KERNELS = ("forward", "keys", "queries")
PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}  # matrix products of each kernel, each batch x heads x S^2 x D FLOPs
SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class Problem:
    """Sequences of one length, as many keys as queries."""

    tokens: int
    length: int
    heads: int
    head_dim: int
    rotary: bool

    def launch_options(self) -> tuple[Any, ...]:
        """What both launchers take last: groups, queries, head_dim, length, window, interleaved, scale."""
        return self.heads, 1, self.head_dim, self.length, 0, False, self.head_dim**-0.5

    def table(self, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The rotary table, if there is one."""
        return rotary_table(self.length, self.head_dim, 10000.0, device) if self.rotary else (None, None)


class Skipped:
    """In place of a kernel: launches nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


class Given:
    """In place of the kernel for the row sums: they are known already."""

    def __init__(self, delta_hT: Tensor) -> None:
        self.delta_hT = delta_hT

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda out, d_out, delta, *args, **options: delta.copy_(self.delta_hT)


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Inside, a module's attributes have these values."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def only(kernel: str, tiles: Tiles | None, delta_hT: Tensor | None = None) -> Iterator[None]:
    """Inside, the launchers give one kernel these tiles (None: its own) and leave out the other of the backward."""
    if kernel == "forward":
        own = attention_forward.forward_tiles
        with replaced(attention_forward, forward_tiles=lambda *args: tiles or own(*args)):
            yield
        return
    both = attention_backward.backward_tiles

    def chosen(*args: Any) -> tuple[Tiles, Tiles]:
        for_keys, for_queries = both(*args)
        return (tiles or for_keys, for_queries) if kernel == "keys" else (for_keys, tiles or for_queries)

    other = "queries" if kernel == "keys" else "keys"
    values: dict[str, Any] = {"backward_tiles": chosen, f"attention_backward_{other}_kernel": Skipped()}
    if delta_hT is not None:
        values["attention_delta_kernel"] = Given(delta_hT)
    with replaced(attention_backward, **values):
        yield


def own_tiles(kernel: str, arch: int, head_dim: int) -> Tiles:
    """What a launcher takes by itself."""
    if kernel == "forward":
        return attention_forward.forward_tiles(arch, torch.bfloat16, head_dim)
    return attention_backward.backward_tiles(arch, torch.bfloat16, head_dim)[kernel == "queries"]


def candidates(kernel: str, arch: int, head_dim: int) -> list[Tiles]:
    """The tiles in use first, then all that fit: shared memory of the pipeline, 8 rows a warp, sums in registers."""
    own = own_tiles(kernel, arch, head_dim)
    found = [own]
    for m, n, warps, stages in product((32, 64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        fixed, moving = (n, m) if kernel == "keys" else (m, n)
        held = {"forward": 1, "keys": 2, "queries": 2}[kernel] * fixed  # rows that lie still: q; k, v; q, d_o
        sums = (2 if kernel == "keys" else 1) * fixed * head_dim + fixed * moving * (1 if kernel == "forward" else 2)
        fits = 2 * head_dim * (held + 2 * stages * moving) <= SHARED_BYTES and sums / (32 * warps) <= 224
        is_even = fixed >= max(64, 8 * warps) and moving <= 128 and 2 * fixed >= moving
        if fits and is_even and (m, n, warps, stages) != (own.m, own.n, own.warps, own.stages):
            found.append(Tiles(m, n, warps, stages))
    return found


def compile_apart(kernel: str, tiles: Tiles, problem: Problem, arch: int) -> str:
    """Compile in a process of its own, since some tiles crash a compiler; why it failed, or nothing."""
    what = json.dumps([kernel, asdict(tiles), asdict(problem), arch])
    command = [sys.executable, __file__, "--ahead", what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        return "not compiled in 90 s"
    if done.returncode == 0:
        return ""
    return f"not compiled: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1][:120]}"


def compile_ahead(kernel: str, tiles: Tiles, problem: Problem, arch: int) -> None:
    """Compile one kernel into Triton's cache, without a GPU."""
    from megapoly_kernels.report import compile_only

    cpu = torch.device("cpu")
    heads, width = problem.heads, problem.head_dim
    qkv_TF = torch.empty(problem.tokens, 3 * heads * width, dtype=torch.bfloat16)
    out_ThK = torch.empty(problem.tokens, heads, width, dtype=torch.bfloat16)
    lse_hT = torch.empty(heads, problem.tokens)
    table, options = problem.table(cpu), problem.launch_options()
    with compile_only(arch), only(kernel, tiles):
        if kernel == "forward":
            launch_forward(qkv_TF, *table, None, None, None, *options)
        else:
            launch_backward(out_ThK, qkv_TF, out_ThK, lse_hT, *table, None, None, None, None, *options)


class Bench:
    """Data of one problem on the GPU, what SDPA makes of it, and the measurement of tiles."""

    def __init__(self, problem: Problem, machine: Machine) -> None:
        self.problem, self.machine = problem, machine
        heads, width, tokens = problem.heads, problem.head_dim, problem.tokens
        self.qkv_TF = machine.random(tokens, 3 * heads * width, seed=1)
        self.d_out_ThK = machine.random(tokens, heads, width, seed=2)
        self.table = problem.table(machine.device)
        leaf = self.qkv_TF.clone().requires_grad_()
        shape, sequences = HeadShape(heads, 1, width), Sequences(problem.length)
        out_ThK = rotary_attention_reference(leaf, shape, sequences, *self.table)
        (grad_TF,) = torch.autograd.grad(out_ThK, leaf, self.d_out_ThK)
        self.expected = {"forward": [out_ThK.detach().float()]}
        d_q, d_k, d_v = (x.float() for x in shape.split(grad_TF))
        self.expected |= {"keys": [d_k, d_v], "queries": [d_q]}
        self.rotated_TF = self.qkv_TF.clone()
        self.out_ThK, self.lse_hT = self.forward(self.rotated_TF)
        self.delta_hT = (self.out_ThK.float() * self.d_out_ThK.float()).sum(-1).T.contiguous()

    def forward(self, qkv_TF: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass, which rotates in place."""
        return launch_forward(qkv_TF, *self.table, None, None, None, *self.problem.launch_options())

    def backward(self) -> Tensor:
        """What is left of the backward pass inside `only`."""
        tensors = (self.d_out_ThK, self.rotated_TF, self.out_ThK, self.lse_hT)
        return launch_backward(*tensors, *self.table, None, None, None, None, *self.problem.launch_options())

    def measure(self, kernel: str, tiles: Tiles) -> dict[str, Any]:
        """Milliseconds, TFLOP/s of the products that the kernel makes, and its error; or why there are none."""
        told: dict[str, Any] = {"kernel": kernel, **asdict(self.problem), "tiles": asdict(tiles), "note": ""}
        try:
            with only(kernel, tiles, self.delta_hT):
                if kernel == "forward":
                    actual = [self.forward(self.qkv_TF.clone())[0]]
                    call: Callable[[], Any] = partial(self.forward, self.qkv_TF.clone())
                else:
                    d_q, *d_kv = HeadShape(self.problem.heads, 1, self.problem.head_dim).split(self.backward())
                    actual, call = [d_q] if kernel == "queries" else d_kv, self.backward
                told["error"] = relative_error(actual, self.expected[kernel], lambda x: x)
                told["ms"], _ = time_calls([call], self.machine)
        except Exception as error:  # tiles that need too much of something
            torch.cuda.synchronize()  # raises where the GPU is lost: nothing can follow then
            return told | {"note": first_line(error)}
        p = self.problem
        flops = PRODUCTS[kernel] * p.tokens * p.length * p.heads * p.head_dim
        wrong = "" if told["error"] <= 3e-2 else "WRONG"
        return told | {"tflop_per_s": flops / told["ms"] / 1e9, "note": wrong}


def lines_of(results: list[dict[str, Any]], own: Tiles) -> Iterator[str]:
    """A table, the fastest right one first."""
    for told in sorted(results, key=lambda told: (bool(told["note"]), told.get("ms", 0.0))):
        tiles = Tiles(**told["tiles"])
        name = f"m {tiles.m:>3}  n {tiles.n:>3}  warps {tiles.warps}  stages {tiles.stages}"
        figures = f"{told['ms']:>9.4f}{told['tflop_per_s']:>9.1f}{told['error']:>10.1e}" if "ms" in told else ""
        yield f"  {name}{figures}  {'in use  ' * (tiles == own)}{told['note']}".rstrip()


def tune(
    problem: Problem, kernels: list[str], machine: Machine, arch: int, until: float, keep: Callable[[dict], None]
) -> None:
    """Measure the tiles of each kernel as they come from the compiler, until the time is over, and print tables."""
    bench = Bench(problem, machine)
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 4) - 2))
    lists = [[(kernel, tiles) for tiles in candidates(kernel, arch, problem.head_dim)] for kernel in kernels]
    queued = {pool.submit(compile_apart, *some, problem, arch): some for some in in_turn(lists)}
    results: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in kernels}
    try:
        for future in as_completed(queued, timeout=max(1.0, until - time.monotonic())):
            kernel, tiles = queued[future]
            told = {"kernel": kernel, **asdict(problem), "tiles": asdict(tiles), "note": future.result()}
            told = told if told["note"] else bench.measure(kernel, tiles)
            results[kernel].append(told)
            keep(told)
            if time.monotonic() > until:
                break
    except TimeoutError:
        print("the time is over")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for kernel, some in results.items():
        total = sum(k == kernel for k, _ in queued.values())
        print(f"\n{kernel}  {problem}  {len(some)} of {total} tiles\n{'':<35}{'ms':>8}{'TFLOP/s':>9}{'error':>10}")
        print("\n".join(lines_of(some, own_tiles(kernel, arch, problem.head_dim))), flush=True)


def in_turn(lists: list[list[Any]]) -> Iterator[Any]:
    """One of each list in turn."""
    for i in range(max(map(len, lists))):
        yield from (some[i] for some in lists if i < len(some))


def main() -> int:
    """Try the tiles out; with --smoke only list them."""
    parser = arguments("Times attention's kernels with other tiles.")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--length", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rotary", action="store_true")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--seconds", type=float, default=240, help="when to stop, all problems together")
    parser.add_argument("--ahead", type=json.loads, help=argparse.SUPPRESS)  # what a process of its own compiles
    options = parser.parse_args()
    if options.ahead:
        kernel, tiles, problem, arch = options.ahead
        compile_ahead(kernel, Tiles(**tiles), Problem(**problem), arch)
        return 0
    if not is_runnable(options.smoke):
        return NO_GPU
    if options.smoke:
        for kernel, width in product(options.kernels, options.head_dim):
            print(f"{kernel}, heads of {width}: {len(candidates(kernel, 90, width))} tiles")
        return 0
    device = torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability(device)
    machine = Machine(device, False, torch.cuda.get_device_name(device))
    head, results = environment(False), []

    def keep(told: dict[str, Any]) -> None:
        results.append(told)
        if options.json:
            write_json(options.json, head | {"tiles": results})

    problems = list(product(options.head_dim, options.length))
    begin = time.monotonic()
    for i, (width, length) in enumerate(problems, 1):
        problem = Problem(options.tokens, length, options.hidden // width, width, options.rotary)
        until = begin + options.seconds * i / len(problems)
        tune(problem, options.kernels, machine, 90 if major >= 9 else 10 * major + minor, until, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
