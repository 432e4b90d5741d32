"""Numerical trouble: steps that are not finite, and spikes of the loss or the gradient norm, found without waiting.

What decides about a step is taken on the device, from numbers that all ranks share. The host reads them a step later,
when the device has the next one to do, and says what happened.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.errors import Echo, TroubleError
from megapoly.log import Console
from megapoly.model.count import parameter_shapes
from megapoly.optim.arrears import Arrears
from megapoly.optim.loss_scale import LossScaler
from megapoly.parallel.collectives import all_reduce_
from megapoly.parallel.gradients import FlatBuffers
from megapoly.sections import Config, ResilienceConfig

MAD_OF_NORMAL = 1.4826  # a normal distribution's standard deviation in units of its median absolute deviation
LEAST_SPREAD = 0.01  # of the median: where past values hardly differ, a small step up is no spike
KINDS = ("loss", "gradient norm")


class Past:
    """The last values of a quantity, and the limit above which the next one is a spike.

    The limit is the median plus `threshold` robust standard deviations (Hampel 1974: the median absolute deviation,
    scaled); one spike, or several, hardly move it. There is none before half of the window is full.
    """

    def __init__(self, cfg: ResilienceConfig) -> None:
        self.threshold = cfg.spike_threshold
        self.values: deque[float] = deque(maxlen=cfg.spike_window)

    @property
    def limit(self) -> float:
        """Above this lies a spike."""
        assert self.values.maxlen is not None
        if 2 * len(self.values) < self.values.maxlen:
            return math.inf
        middle = statistics.median(self.values)
        spread = MAD_OF_NORMAL * statistics.median(abs(value - middle) for value in self.values)
        return middle + self.threshold * max(spread, LEAST_SPREAD * abs(middle))


class FirstBad:
    """Finds the first parameter, in the order of the model, whose gradient is not finite."""

    def __init__(self, cfg: Config, vocab_size: int, buffers: FlatBuffers) -> None:
        self.names = [name for name, _ in parameter_shapes(cfg.model, vocab_size)]
        held = [s for s in buffers.segments if s.parameter.requires_grad and s.owned[0] < s.owned[1]]
        self.places = [slice(*s.owned) for s in held]
        numbers = [float(self.names.index(s.name)) for s in held]
        self.numbers = torch.tensor(numbers, dtype=torch.float64, device=buffers.params.device)

    def __call__(self, owned_grad: Tensor) -> Tensor:
        """Its number among those that this rank owns a part of, an fp64 scalar on the device; inf where there is none.

        The largest entry tells, not the sum of squares, which overflows sooner.
        """
        if not self.places:
            return owned_grad.new_full((), math.inf, dtype=torch.float64)
        parts = [owned_grad[place] for place in self.places]
        if owned_grad.device.type == "cpu":  # where torch is slow at these norms
            peaks = torch.stack([end for part in parts for end in torch.aminmax(part)]).view(-1, 2)
        else:
            peaks = torch.stack(torch._foreach_norm(parts, math.inf))[:, None]
        return torch.where(peaks.isfinite().all(1), math.inf, self.numbers).min()

    def name(self, number: float) -> str | None:
        """The parameter of a number; None for inf."""
        return self.names[int(number)] if math.isfinite(number) else None


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm left what was usual."""

    step: int
    kind: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"the {self.kind} is {self.value:.4g}, above {self.limit:.4g}"


@dataclass(frozen=True)
class _Judged:
    """A step that was judged on the device: `signal` is its loss, gradient norm and minus its first bad parameter."""

    step: int
    signal: Arrears
    limit: float
    is_expected: bool


class Watch:
    """Judges every step, counts those whose update is not taken, and remembers what was usual."""

    def __init__(self, cfg: Config, vocab_size: int, buffers: FlatBuffers, console: Console) -> None:
        self.cfg, self.mesh, self.console = cfg.resilience, buffers.mesh, console
        self.first_bad = FirstBad(cfg, vocab_size, buffers)
        self.losses, self.norms = Past(self.cfg), Past(self.cfg)
        self.skipped_steps = self.skipped_in_a_row = 0
        self.notes: dict[int, str] = {}
        self.spike: Spike | None = None  # the first that asks for a rollback
        self._judged: _Judged | None = None

    def judge(self, step: int, by_source: Tensor, grad_norm: Tensor, owned_grad: Tensor, scaler: LossScaler) -> Tensor:
        """Whether the step's update may be taken: a boolean on the device, the same on every rank.

        by_source [2, sources] and grad_norm are the whole step's; owned_grad is this rank's shard of the gradients.
        Raises TroubleError where too many steps in a row before this one were not taken.
        """
        self.settle()
        loss = by_source[0].sum() / by_source[1].sum()
        numbers = torch.stack([loss, grad_norm])
        signal = torch.cat([torch.where(numbers.isfinite(), numbers, math.inf), -self.first_bad(owned_grad)[None]])
        all_reduce_(signal, self.mesh.world, dist.ReduceOp.MAX)
        limit = self.norms.limit if self.cfg.spike_policy == "skip" else math.inf
        self._judged = _Judged(step, Arrears(signal), limit, scaler.expects_overflow)
        return signal[:2].isfinite().all() & (signal[1] <= limit)

    def settle(self) -> None:
        """Learn the verdict on the last step that was judged, count it and say what was wrong.

        On a GPU the host waits for that step. Raises TroubleError where too many in a row were not taken.
        """
        if self._judged is None:
            return
        judged, self._judged = self._judged, None
        loss, norm, number = judged.signal.read()
        if not math.isfinite(loss + norm):
            if not judged.is_expected:
                self._skip(judged.step, what_is_not_finite(loss, norm, self.first_bad.name(-number)))
            return
        limits = (self.losses.limit, self.norms.limit)
        self.losses.values.append(loss)
        self.norms.values.append(norm)
        found = zip(KINDS, (loss, norm), limits, strict=True)
        spikes = [Spike(judged.step, kind, value, limit) for kind, value, limit in found if value > limit]
        if norm > judged.limit:
            self._skip(judged.step, "; ".join(map(str, spikes)))
            return
        self.skipped_in_a_row = 0
        if spikes and self.cfg.spike_policy != "off":
            self._note(judged.step, "; ".join(map(str, spikes)))
            if self.cfg.spike_policy == "rollback" and self.spike is None:
                self.spike = spikes[0]

    def _skip(self, step: int, why: str) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self._note(step, f"{why}; the update is not taken (number {self.skipped_steps} of the run)")
        most = self.cfg.max_skipped_steps
        if not most or self.skipped_in_a_row < most:
            return
        if not self.mesh.is_main:
            raise Echo(why)
        raise TroubleError(
            f"step {step}: {why}; no update was taken for {most} steps in a row (max_skipped_steps): "
            "lower lr, raise precision (fp32_residual_connection), or look at the step with --replay"
        )

    def _note(self, step: int, what: str) -> None:
        self.notes[step] = what
        self.console.say(f"  step {step}: {what}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        self.settle()
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "losses": list(self.losses.values),
            "norms": list(self.norms.values),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; what was judged since is forgotten."""
        self._judged, self.spike = None, None
        self.notes.clear()
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        for past, values in ((self.losses, state["losses"]), (self.norms, state["norms"])):
            past.values.clear()
            past.values.extend(values)


def what_is_not_finite(loss: float, norm: float, name: str | None) -> str:
    """In words; `name` is the first parameter whose gradient is not finite, None where each is by itself."""
    parts = [] if math.isfinite(loss) else ["the loss is not finite"]
    if name is not None:
        parts.append(f"the gradient is not finite, first of {name}")
    elif not math.isfinite(norm):
        parts.append("the gradient's norm is beyond fp32, though every entry is finite")
    return ", ".join(parts) + (f" (loss {loss:.4g})" if math.isfinite(loss) else "")
