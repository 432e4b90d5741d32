"""One recorded step again, alone: `--replay STEP` on any layout, to find the cause of what it did. Nothing is saved."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.checkpoint.folders import roots_of, step_folders, step_of
from megapoly.checkpoint.load import CheckpointReader
from megapoly.errors import CheckpointError, ConfigError, DamageError, Echo
from megapoly.parallel.collectives import all_reduce_
from megapoly.train.metrics import mean
from megapoly.train.prepare import Prepared, as_begun, own_checkpoints
from megapoly.train.rollback import has_way_of
from megapoly.train.rows import rows_of
from megapoly.train.setup import Run
from megapoly.train.start import load_state
from megapoly.train.step import train_step
from megapoly.train.trouble import FirstBad

MOST_NAMED = 10  # parameters, those with the largest gradients


def prepared_before(prepared: Prepared, step: int) -> Prepared:
    """What is prepared with the newest checkpoint before a step to start from; else as the run began.

    A step that a rollback leaves out is replayed as it was before: with its data. Raises ConfigError for a step that
    the run does not have.
    """
    run_dir = Path(prepared.cfg.logging.run_dir)
    if not own_checkpoints(prepared.cfg) and not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(f"{run_dir}: no run to replay a step of: it has neither metrics.jsonl nor checkpoints")
    if not 1 <= step <= prepared.num_steps:
        raise ConfigError(f"replay ({step}) must be a step of the run, from 1 to {prepared.num_steps}")
    folders = [folder for root in roots_of(prepared.cfg.checkpoint) for folder in step_folders(root)]
    for folder in sorted(folders, key=lambda folder: int(folder.name[5:]), reverse=True):
        if int(folder.name[5:]) < step and folder not in prepared.skipped:
            try:
                reader = CheckpointReader.at(folder)
            except CheckpointError:
                continue  # damaged: an older one will do
            before = _going_to(prepared, reader, True, step)
            if has_way_of(reader, before.plan):
                return before
    begun = as_begun(prepared)
    if step <= begun.start_step:
        assert begun.checkpoint is not None
        raise ConfigError(
            f"replay ({step}) must be a step of the run, from {begun.start_step + 1} to {prepared.num_steps}: "
            f"it began with {begun.checkpoint.folder}"
        )
    return _going_to(begun, begun.checkpoint, False, step)


def _going_to(prepared: Prepared, start: CheckpointReader | None, is_own: bool, step: int) -> Prepared:
    """The same from a start before a step; where the plan leaves all of the step out, it has its samples again."""
    there = dataclasses.replace(prepared, checkpoint=start, is_resume=is_own, changes=())
    if not there.leaves_out(step):
        return there
    begin, end = there.samples_after(step - 1), there.samples_after(step)
    kept = tuple((a, b) for a, b in there.plan.left_out if not (a < end and begin < b))
    return dataclasses.replace(there, plan=dataclasses.replace(there.plan, left_out=kept))


def run_again(run: Run, step: int) -> bool:
    """Load what a replay starts from and replay the step; False where a signal stopped it before."""
    try:
        load_state(run)
    except DamageError:
        if run.mesh.is_main:
            raise
        raise Echo("the main rank says what is damaged") from None
    return replay(run, step)


def replay(run: Run, step: int) -> bool:
    """Run the steps up to `step` again, and that one with a look at all it computes and at its row of metrics.jsonl.

    `run` has loaded what it starts from; all ranks call it together. Returns False where a signal stopped it before.
    """
    prepared, console, progress = run.prepared, run.console, run.progress
    start = prepared.checkpoint.folder if prepared.checkpoint is not None else "drawn weights"
    console.say(f"replaying step {step}, from step {prepared.start_step} ({start})")
    for earlier in range(prepared.start_step + 1, step):
        if prepared.leaves_out(earlier):
            continue
        if progress.stops_after(earlier - 1):
            console.say(f"stopped before step {earlier} ({progress.reason}); the same command starts again")
            return False
        progress.enter(f"train step {earlier}")
        train_step(run, earlier)
    progress.enter(f"train step {step}")
    probe = Probe(run)
    with probe.watching():
        stats = train_step(run, step)
    run.watch.settle()
    names = [source.name for source in run.cfg.data.sources]
    sums, counts = stats.by_source.tolist()
    by_source = {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
    tokens = {n: int(c) for n, c in zip(names, counts, strict=True)}
    again = {
        "loss": mean(by_source, tokens, names),
        "loss_by_source": by_source,
        "grad_norm": stats.grad_norm.item(),
    }
    console.say(f"loss {again['loss']:.6g} ({', '.join(f'{n} {loss:.6g}' for n, loss in by_source.items())})")
    console.say(f"gradient norm {again['grad_norm']:.6g}; of the parameters with the largest:")
    for name, norm in probe.largest(stats.loss_scale):
        console.say(f"  {norm:12.6g}  {name}")
    layer, parameter = probe.first_layer(), probe.first_parameter()
    console.say(f"first output that is not finite: {'none' if layer is None else f'that of {layer}'}")
    console.say(f"first gradient that is not finite: {'none' if parameter is None else f'that of {parameter}'}")
    told = compared(again, recorded(Path(run.cfg.logging.run_dir) / "metrics.jsonl", step))
    console.say(told + (other_layout(run, step) if told.startswith("differs") else ""))
    return True


class Probe:
    """Looks at a step's outputs, layer by layer, and at its gradients, parameter by parameter."""

    def __init__(self, run: Run) -> None:
        self.run, self.bad = run, FirstBad(run.cfg, run.prepared.vocab_size, run.buffers)
        self.layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.bad.names))
        device = run.mesh.device
        self.norms = torch.zeros(len(self.bad.names), dtype=torch.float64, device=device)
        self.layer, self.parameter = (torch.full((), math.inf, dtype=torch.float64, device=device) for _ in range(2))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the step that is made within."""
        modules = [pair for chunk in self.run.chunks for pair in chunk.named_modules() if pair[0] in self.layers]
        handles = [module.register_forward_hook(self._see(self.layers.index(name))) for name, module in modules]
        finish = self.run.buffers.finish

        def finish_seen() -> Tensor:
            owned = finish()
            self._measure(owned)
            return owned

        self.run.buffers.finish = finish_seen  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.run.buffers.finish = finish  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()
        for number in (self.layer, self.parameter):
            all_reduce_(number, self.run.mesh.world, dist.ReduceOp.MIN)
        all_reduce_(self.norms, self.run.mesh.world)

    def _see(self, number: int) -> Callable[..., None]:
        @torch.no_grad()
        def see(_: object, __: object, output: Any) -> None:
            for x in output if isinstance(output, tuple) else (output,):
                if isinstance(x, Tensor):
                    found = torch.where(x.isfinite().all(), math.inf, float(number))
                    self.layer.copy_(torch.minimum(self.layer, found))

        return see

    @torch.no_grad()
    def _measure(self, owned: Tensor) -> None:
        self.parameter.copy_(self.bad(owned))
        for segment in self.run.buffers.segments:
            if segment.is_counted and segment.parameter.requires_grad:
                number = self.bad.names.index(segment.name)
                self.norms[number] += owned[slice(*segment.owned)].double().square().sum()

    def largest(self, loss_scale: float) -> list[tuple[str, float]]:
        """Parameters with the largest gradient norms, those that are no numbers first."""
        norms = (self.norms.sqrt() / loss_scale).tolist()
        pairs = sorted(zip(self.bad.names, norms, strict=True), key=lambda pair: -_size(pair[1]))
        return pairs[:MOST_NAMED]

    def first_layer(self) -> str | None:
        """The first layer, in the order of the model, with an output that was not finite."""
        number = self.layer.item()
        return self.layers[int(number)] if math.isfinite(number) else None

    def first_parameter(self) -> str | None:
        """The first parameter with a gradient that was not finite."""
        return self.bad.name(self.parameter.item())


def _size(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def recorded(path: Path, step: int) -> dict[str, Any] | None:
    """A step's row of metrics.jsonl; None where it has none."""
    found = next((row for row in rows_of(path) if row["step"] == step), None)
    return None if found is None or "left_out" in found else found


def compared(again: dict[str, Any], row: dict[str, Any] | None) -> str:
    """In words, whether a step's losses and gradient norm are those of its row (null: not finite)."""
    if row is None:
        return "metrics.jsonl has no row of this step to compare with"
    differing = []
    for key, now in again.items():
        for name, value in now.items() if isinstance(now, dict) else ((None, now),):
            was: Any = row.get(key)
            was = was.get(name) if isinstance(was, dict) else was
            value = value if math.isfinite(value) else None
            if was != value:
                label = key if name is None else f"{key} of {name}"
                is_number = type(was) is float and was != 0 and value is not None
                by = f" (by {abs(value - was) / abs(was):.2g})" if is_number else ""
                differing.append(f"{label} was {str(was)[:40]} and is {value}{by}")
    return "equal to its row of metrics.jsonl" if not differing else f"differs from its row: {'; '.join(differing)}"


def other_layout(run: Run, step: int) -> str:
    """In words, that a step was made on another layout than this one, as the next checkpoint has it; else empty."""
    folders = sorted(own_checkpoints(run.cfg), key=lambda folder: step_of(folder) or 0)
    made = [folder for folder in folders if (step_of(folder) or 0) >= step] or folders[-1:]
    here = run.checkpoint_state(step)["layout"]
    try:
        there = CheckpointReader.at(made[0]).state.get("layout") if made else None
    except CheckpointError:
        there = None  # damaged: nobody knows
    if not isinstance(there, dict) or there.keys() != here.keys() or there == here:
        return ""
    was, now = (
        " x ".join(f"{name.upper()} {str(size)[:9]}" for name, size in sizes.items()) for sizes in (there, here)
    )
    return f" (it was made on {was}, this is {now}: sums are taken in another order)"
