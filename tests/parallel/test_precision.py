"""fp32_residual_connection: the residual stream is fp32 between blocks, tensor-parallel ranks and pipeline stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_runs import tiny_config, tiny_run

from megapoly.model.norm import Norm
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.step import train_step


@contextmanager
def watched_sends(dtypes: set[str]) -> Iterator[None]:
    """Types of all tensors that ranks send to each other one to one."""
    original = dist.P2POp

    def watch(way: Any, tensor: torch.Tensor, *args: Any, **options: Any) -> dist.P2POp:
        dtypes.add(str(tensor.dtype))
        return original(way, tensor, *args, **options)

    dist.P2POp = watch  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        dist.P2POp = original  # type: ignore[misc]


def types_seen(mesh: Mesh, cfg: Config) -> dict[str, list[str]]:
    """Types of what is sent, of the residual streams that leave norms, of what is normed, and of parameters."""
    run = tiny_run(mesh, cfg)
    seen: dict[str, set[str]] = {"sent": set(), "residual": set(), "normed": set()}

    def look(_: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        seen["normed"].add(str(output[0].dtype))
        seen["residual"].add(str(output[1].dtype))

    for module in run.chunks[0].modules():
        if isinstance(module, Norm):
            module.register_forward_hook(look)
    with watched_sends(seen["sent"]):
        train_step(run, 1)
    seen["parameters"] = {str(parameter.dtype) for parameter in run.chunks[0].parameters()}
    seen["gradients"] = {str(run.buffers.grads.dtype), str(run.buffers.owned_grads.dtype)}
    return {name: sorted(types) for name, types in seen.items()}


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("is_wide", [True, False])
def test_the_residual_stream_keeps_its_type_over_tp_sp_and_pp(half: str, is_wide: bool, tmp_path: Path) -> None:
    cfg = tiny_config(
        tmp_path, "gpt2", tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True,
        fp32_residual_connection=is_wide, hidden_size=48, ffn_hidden_size=64, initial_loss_scale=2.0**10, **{half: True},
    )  # fmt: skip
    narrow = "torch.bfloat16" if half == "bf16" else "torch.float16"
    stream = "torch.float32" if is_wide else narrow
    for seen in run_ranks(types_seen, cfg, tp=2, pp=2):
        assert seen == {
            "sent": [stream], "residual": [stream], "normed": [narrow], "parameters": [narrow],
            "gradients": ["torch.float32"],
        }  # fmt: skip
