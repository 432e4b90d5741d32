"""The executor of pipeline schedules: runs a rank's actions and moves activations between neighbours.

What an action needs is received, and what it made is sent, in one batch between two actions, so that both directions
progress at once and no pair of ranks can wait for each other.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.parallel.mesh import Axis
from megapoly.parallel.schedule import Action

# Forward of a micro-batch on this stage: (number, activations from the previous stage or None) -> the activations for
# the next stage or, on the last, the scalar to be minimised.
StageForward = Callable[[int, Tensor | None], Tensor]


class Pipeline:
    """Runs schedules over the pipeline axis.

    Activations between stages have one shape, [tokens of this rank, hidden], and the residual stream's type.
    """

    def __init__(self, pp: Axis, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.pp, self.shape, self.dtype, self.device = pp, shape, dtype, device
        self._sends: deque[tuple[list[dist.Work], Tensor]] = deque()

    def run(self, actions: Sequence[Action], forward: StageForward) -> None:
        """Run the actions in order; gradients accumulate in the parameters."""
        inputs: dict[int, Tensor | None] = {}
        outputs: dict[int, Tensor] = {}
        received = self._exchange(None, None, actions[0])
        for position, action in enumerate(actions):
            i = action.microbatch
            made: Tensor | None
            if action.kind == "F":
                inputs[i] = received
                made = outputs[i] = forward(i, received)
            else:
                torch.autograd.backward(outputs.pop(i), received)
                entered = inputs.pop(i)
                made = None if entered is None else entered.grad
            if not torch.is_grad_enabled():
                inputs.pop(i)
                outputs.pop(i)
            following = actions[position + 1] if position + 1 < len(actions) else None
            received = self._exchange(action, made, following)
        while self._sends:
            self._wait_oldest_send()

    def _exchange(self, done: Action | None, made: Tensor | None, following: Action | None) -> Tensor | None:
        """Send what `done` made and receive what `following` needs, together."""
        operations = []
        received = None
        if following is not None and (peer := self._source(following)) is not None:
            received = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            operations.append(dist.P2POp(dist.irecv, received, group=self.pp.group, group_peer=peer))
        payload = None
        if done is not None and made is not None and (peer := self._target(done)) is not None:
            payload = made.detach().contiguous()
            operations.append(dist.P2POp(dist.isend, payload, group=self.pp.group, group_peer=peer))
        if not operations:
            return None
        works = dist.batch_isend_irecv(operations)
        if received is not None:
            works[0].wait()
            if following is not None and following.kind == "F" and torch.is_grad_enabled():
                received.requires_grad_()
        if payload is not None:
            # Bounded by the number of stages, not of micro-batches: the oldest send has long been taken.
            self._sends.append(([works[-1]], payload))
            if len(self._sends) > 2 * self.pp.size:
                self._wait_oldest_send()
        return received

    def _wait_oldest_send(self) -> None:
        works, _ = self._sends.popleft()
        for work in works:
            work.wait()

    def _source(self, action: Action) -> int | None:
        if action.kind == "F":
            return None if self.pp.is_first else self.pp.rank - 1
        return None if self.pp.is_last else self.pp.rank + 1

    def _target(self, action: Action) -> int | None:
        if action.kind == "F":
            return None if self.pp.is_last else self.pp.rank + 1
        return None if self.pp.is_first else self.pp.rank - 1
