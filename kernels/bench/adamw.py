"""One AdamW step over a flat shard: python kernels/bench/adamw.py [--parameters 1700000000]"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from formulas import adamw_bytes
from harness import Case, Contestant, Inputs, Machine, Pair, Run, arguments, main
from megapoly_kernels import Range, RangeTable, adamw_
from results import Target
from torch import Tensor

STEP = 10
RULE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
DECAY = 0.1
COMPARED = 1 << 20  # entries that are held against the reference
STATE = ("master", "grad", "exp_avg", "exp_avg_sq")


def ours(backend: str, ranges: RangeTable) -> Run:
    """megapoly's operation, with the clipping that a training step folds into it."""

    def run(inputs: Inputs) -> list[Tensor]:
        o = inputs.other
        state = [o[name] for name in STATE]
        adamw_(*state, STEP, ranges, **RULE, scale=o["scale"], params=o["params"], backend=backend)
        return [o["master"], o["params"]]

    return run


def with_copy(step: Callable[[dict[str, Any]], Any]) -> Run:
    """Another optimizer's step, and the copy of the master weights to bf16 that it leaves to the caller."""

    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            step(inputs.other)
            inputs.other["params"].copy_(inputs.other["master"])
        return [inputs.other["master"], inputs.other["params"]]

    return run


def fused_function(o: dict[str, Any]) -> None:
    """torch's fused kernel by itself, which takes the number of this step."""
    lists = [[o[name]] for name in STATE]
    torch._fused_adamw_(*lists, [], [o["this_step"]], **RULE, weight_decay=DECAY, amsgrad=False, maximize=False)


def with_torch_optimizer(inputs: Inputs) -> Inputs:
    """torch.optim.AdamW(fused=True) over the flat master weights, in the state that the shard is in."""
    o = inputs.other
    master = torch.nn.Parameter(o["master"])
    master.grad = o["grad"]
    betas = (RULE["beta1"], RULE["beta2"])
    optimizer = torch.optim.AdamW([master], RULE["lr"], betas, RULE["eps"], DECAY, fused=True)
    optimizer.state[master] = {"step": o["step"], "exp_avg": o["exp_avg"], "exp_avg_sq": o["exp_avg_sq"]}
    return Inputs([], [], {**o, "optimizer": optimizer})


def with_apex_optimizer(inputs: Inputs) -> Inputs:
    """NVIDIA apex's FusedAdam, likewise."""
    from apex.optimizers import FusedAdam

    o = inputs.other
    master = torch.nn.Parameter(o["master"])
    master.grad = o["grad"]
    betas = (RULE["beta1"], RULE["beta2"])
    optimizer = FusedAdam([master], lr=RULE["lr"], betas=betas, eps=RULE["eps"], weight_decay=DECAY)
    optimizer.state[master] = {"exp_avg": o["exp_avg"], "exp_avg_sq": o["exp_avg_sq"]}
    optimizer.param_groups[0]["step"] = STEP - 1
    return Inputs([], [], {**o, "optimizer": optimizer})


def reference(inputs: Inputs) -> Pair:
    """The rule in float64 on the entries that are compared (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    master, grad, exp_avg, exp_avg_sq = (inputs.other[name][:COMPARED].double() for name in STATE)
    exp_avg.lerp_(grad, 1 - RULE["beta1"])
    exp_avg_sq.mul_(RULE["beta2"]).addcmul_(grad, grad, value=1 - RULE["beta2"])
    root = (exp_avg_sq / (1 - RULE["beta2"] ** STEP)).sqrt() + RULE["eps"]
    master -= RULE["lr"] * (DECAY * master + exp_avg / (1 - RULE["beta1"] ** STEP) / root)
    return [master.float()], []


def checked(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
    """The master weights, not a number where their bf16 copy is not what they round to."""
    master, params = (x[:COMPARED] for x in outputs)
    return [torch.where(params == master.to(params.dtype), master, torch.nan)], grads


def case(machine: Machine, parameters: int) -> Case:
    """All entries decay; one range."""
    ranges = RangeTable.build([Range(0, parameters, DECAY)], machine.device)

    def make(seed: int) -> Inputs:
        scales = {"master": 0.02, "grad": 1e-3, "exp_avg": 1e-3, "exp_avg_sq": 1e-3}
        other: dict[str, Any] = {
            name: machine.random(parameters, seed=4 * seed + i, dtype=torch.float32, scale=scale)
            for i, (name, scale) in enumerate(scales.items())
        }
        other["exp_avg_sq"].square_()
        other["params"] = other["master"].to(machine.dtype)
        other["scale"] = torch.ones((), device=machine.device)
        other["step"], other["this_step"] = (torch.full((), float(n), device=machine.device) for n in (STEP - 1, STEP))
        return Inputs([], [], other)

    optimizer_step = partial(with_copy, lambda o: o["optimizer"].step())
    peer = partial(Contestant, restore=checked)
    return Case(
        operation="adamw",
        shape=f"{parameters} parameters",
        make=make,
        reference=reference,
        work=adamw_bytes(parameters),
        unit="TB/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(ours, b, ranges), b, restore=checked) for b in machine.backends),
            peer("torch._fused_adamw_ + copy", partial(with_copy, fused_function)),
            peer("torch AdamW(fused=True) + copy", optimizer_step, prepare=with_torch_optimizer),
            peer("apex FusedAdam + copy", optimizer_step, prepare=with_apex_optimizer),
        ],
        directions=("step",),
        targets={"step": [Target("percent", 90)]},
        record="adamw",
        part=lambda x: x[:COMPARED],
        tolerance=1e-4,
    )


def cases(machine: Machine, options: Any) -> list[Case]:
    """One shard."""
    return [case(machine, 5000 if machine.smoke else options.parameters)]


if __name__ == "__main__":
    parser = arguments("Times one AdamW step with fp32 state and bf16 parameters.")
    parser.add_argument("--parameters", type=int, default=1_700_000_000)
    sys.exit(main("adamw", parser, cases))
