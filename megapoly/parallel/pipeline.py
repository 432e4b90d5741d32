"""The executor of pipeline schedules: runs this rank's actions and moves what they make to where it is taken.

Every rank knows all lists, and so which messages pass in which gap between two actions (`timeline.planned`). A gap's
messages are posted together, and nobody waits for them there: a rank waits only when an action takes what has not come.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapoly.parallel.mesh import Axis
from megapoly.parallel.schedule import Action, Message, Placement, all_lists, forwards_of
from megapoly.parallel.timeline import Transfer, planned
from megapoly.parallel.weight_gradients import WeightGradients

# Forward of a micro-batch through a chunk: (chunk, number, activations from the global stage before or None) -> the
# activations for the next one or, on the last, the scalar to be minimised; where the head is shared, what enters it.
StageForward = Callable[[int, int, Tensor | None], Tensor]
# The shared head of a micro-batch, there and back: (number, what enters it) -> that one's gradient, if there are any.
HeadPass = Callable[[int, Tensor], Tensor | None]


class Program(NamedTuple):
    """What a rank does: its actions, and the transfers before each of them and after the last."""

    actions: Sequence[Action]
    gaps: list[list[Transfer]]


class Pipeline:
    """Runs a schedule over the pipeline axis.

    Activations between stages have one shape, [tokens of this rank, hidden], and the residual stream's type; what
    enters a head that all ranks share has `head_dtype`. Between runs the tokens may become other ones.
    """

    def __init__(
        self, pp: Axis, schedule: str, placement: Placement, shape: tuple[int, int], dtype: torch.dtype,
        device: torch.device, weight_gradients: WeightGradients, head_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.pp, self.schedule, self.placement = pp, schedule, placement
        self.shape, self.dtype, self.head_dtype, self.device = shape, dtype, head_dtype, device
        self.weight_gradients = weight_gradients
        self.last_rank = placement.owner(placement.last)[0]
        self._programs: dict[tuple[int, bool], Program] = {}

    def set_tokens(self, tokens: int) -> None:
        """The tokens of this rank in the micro-batches of the next runs."""
        self.shape = (tokens, self.shape[1])

    def program(self, microbatches: int, backward: bool) -> Program:
        """This rank's part of the schedule; without backward, its forwards in their order."""
        if (microbatches, backward) not in self._programs:
            lists = all_lists(self.schedule, self.pp.size, self.placement.chunks, microbatches)
            if not backward:
                lists = forwards_of(lists)
            rank = self.pp.rank
            self._programs[microbatches, backward] = Program(lists[rank], planned(lists, self.placement)[rank])
        return self._programs[microbatches, backward]

    def run(self, microbatches: int, forward: StageForward, head: HeadPass | None = None) -> None:
        """Take all micro-batches through the pipeline; gradients, where enabled, accumulate in the parameters.

        `head` is for schedules in which all ranks share it.
        """
        program = self.program(microbatches, torch.is_grad_enabled())
        mail, passes = _Mail(self), _Passes(forward, self.weight_gradients)
        for action, transfers in zip(program.actions, program.gaps, strict=False):
            mail.exchange(transfers)
            if action.kind == "H":
                assert head is not None
                mail.give(action.microbatch, head(action.microbatch, mail.share(action.microbatch)))
            else:
                mail.send(action, passes.run(action, mail.take(action)))
        mail.exchange(program.gaps[-1])
        mail.finish()


class _Passes:
    """Forward and backward passes of a run, and what is kept between them: graphs, but no tensor beside them."""

    def __init__(self, forward: StageForward, weight_gradients: WeightGradients) -> None:
        self.forward, self.weight_gradients = forward, weight_gradients
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], GradientEdge] = {}
        self._weights: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def run(self, action: Action, taken: Tensor | None) -> Tensor | None:
        """Do an action with the activations or the gradient it takes; returns what goes to its target."""
        key = action.chunk, action.microbatch
        if action.kind == "F":
            return self._forward(action, taken)
        if action.kind == "W":
            for compute in self._weights.pop(key):
                compute()
            return None
        if action.kind == "B":
            torch.autograd.backward((self._outputs.pop(key),), (taken,))
        else:
            with self.weight_gradients.deferred() as self._weights[key]:
                torch.autograd.backward((self._outputs.pop(key),), (taken,))
        entered = self._inputs.pop(key)
        return None if entered is None else entered.grad

    def _forward(self, action: Action, entered: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(action.chunk, action.microbatch, entered)
        key = action.chunk, action.microbatch
        self._inputs[key] = None if entered is None else entered.requires_grad_()
        made = self.forward(action.chunk, action.microbatch, entered)
        self._outputs[key] = get_gradient_edge(made)  # what was sent need not stay
        return made.detach()


class _Mail:
    """The messages of a run, between ranks and between chunks of this one."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.rank = pipeline, pipeline.pp.rank
        self._made: dict[Message, Tensor] = {}
        self._came: dict[Message, tuple[Tensor, dist.Work | None]] = {}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._ends: dict[int, Tensor] = {}  # what enters a shared head, and then its gradient, on the last stage

    def exchange(self, transfers: list[Transfer]) -> None:
        """Post a gap's sends and receives in one batch."""
        if not transfers:
            return
        operations = []
        for sends, message in transfers:
            p = self.pipeline
            tensor = self._made.pop(message) if sends else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            way, peer = (dist.isend, message.target) if sends else (dist.irecv, message.source)
            operations.append(dist.P2POp(way, tensor, group=p.pp.group, group_peer=peer))
        works = dist.batch_isend_irecv(operations)
        works = works * (len(operations) // len(works))  # NCCL has one for the whole batch
        for (sends, message), operation, work in zip(transfers, operations, works, strict=True):
            if sends:
                self._sent.append((work, operation.tensor))
            else:
                self._came[message] = operation.tensor, work
        while len(self._sent) > 2 * self.pipeline.pp.size:  # bounded by the stages, not by the micro-batches
            self._sent.popleft()[0].wait()

    def send(self, action: Action, made: Tensor | None) -> None:
        """Have what an action made go to its target: in the next exchange, or at once to a chunk of this rank."""
        if made is None:
            return
        message = self.pipeline.placement.sent(self.rank, action)
        if message is None:
            if self.pipeline.head_dtype is not None:
                self._ends[action.microbatch] = made
            return
        if message.target == self.rank:
            self._came[message] = made, None
        else:
            self._made[message] = made.contiguous()

    def take(self, action: Action) -> Tensor | None:
        """What an action takes, once it is there."""
        message = self.pipeline.placement.taken(self.rank, action)
        if message is None:
            return None if action.kind == "F" else self._ends.pop(action.microbatch, None)
        tensor, work = self._came.pop(message)
        if work is not None:
            work.wait()
        return tensor

    def share(self, microbatch: int) -> Tensor:
        """What enters the head, from the last stage to all ranks."""
        p = self.pipeline
        tensor = self._ends.pop(microbatch, None)
        if tensor is None:
            tensor = torch.empty(p.shape, dtype=p.head_dtype, device=p.device)
        if p.pp.group is not None:
            dist.broadcast(tensor, group=p.pp.group, group_src=p.last_rank)
        return tensor

    def give(self, microbatch: int, gradient: Tensor | None) -> None:
        """Begin the last stage's backward with the head's gradient."""
        if gradient is not None and self.rank == self.pipeline.last_rank:
            self._ends[microbatch] = gradient

    def finish(self) -> None:
        """Let the last sends go."""
        while self._sent:
            self._sent.popleft()[0].wait()
