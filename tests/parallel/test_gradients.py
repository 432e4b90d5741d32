"""Buckets: when they are reduced, that nothing depends on how they are cut, and that replicas stay equal."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import assemble, run_ranks
from tiny_runs import keep_first_gradients, tiny_config, tiny_run
from torch import Tensor

from megapoly.checkpoint.state import pieces, training_state
from megapoly.optim.groups import Rules
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.parallel.buckets import ALIGNMENT, WORD, Bucket
from megapoly.parallel.collectives import all_gather
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.step import evaluate, train_step

STEPS = 3
EPS_BF16 = torch.finfo(torch.bfloat16).eps
SMALL = 40_000  # entries: several buckets in the tiny models, some of them of several parameters
HUGE = 1 << 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names and hashes of their bits."""
    return {name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for name, t in tensors.items()}


def training(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    """Losses, first gradients, state after a few steps, and this rank's parameters, of which the hashes."""
    run = tiny_run(mesh, cfg)
    gradients = keep_first_gradients(run)
    losses = [train_step(run, step).by_source.tolist() for step in range(1, STEPS + 1)]
    held_out = evaluate(run).tolist()
    state = assemble(pieces(run.buffers, training_state(run.optimizer), for_saving=True))
    run.buffers.wait_params()
    return {
        "losses": losses,
        "held_out": held_out,
        "gradients": gradients,
        "state": digest(state),
        "params": digest(
            {name: p.detach() for name, p in (entry for chunk in run.chunks for entry in chunk.named_parameters())}
        ),
        "buckets": len(run.buffers.buckets),
    }


@functools.cache
def plain(folder: Path, family: str, bf16: bool, bucket_size: int) -> dict[str, Any]:
    """Two replicas without any overlap."""
    cfg = tiny_config(folder, family, bf16=bf16, ddp_bucket_size=bucket_size, overlap_grad_reduce=False,
                      overlap_param_gather=False)  # fmt: skip
    return run_ranks(training, cfg, dp=2)[0]


@pytest.mark.parametrize(
    ("family", "bf16", "reduces_early", "gathers_late"),
    [("gpt2", False, True, True), ("gpt_neox", True, True, False), ("llama", True, False, True)],
)
def test_overlap_changes_no_bit(family: str, bf16: bool, reduces_early: bool, gathers_late: bool, folder: Path) -> None:
    expected = plain(folder, family, bf16, SMALL)
    cfg = tiny_config(
        folder, family, bf16=bf16, ddp_bucket_size=SMALL, overlap_grad_reduce=reduces_early,
        overlap_param_gather=gathers_late,
    )  # fmt: skip
    for of_rank in run_ranks(training, cfg, dp=2):
        assert of_rank["buckets"] > 5
        for key in ("losses", "held_out", "state", "params"):
            assert of_rank[key] == expected[key], key


@pytest.mark.parametrize("bucket_size", [1, SMALL])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_sum_of_two_replicas_is_the_same_in_any_buckets(family: str, bucket_size: int, folder: Path) -> None:
    """Bit for bit: a sum of two has one order. (Later steps differ in the last bits of the norm and of AdamW.)"""
    expected = plain(folder, family, False, HUGE)
    assert expected["buckets"] == 2
    got = run_ranks(training, tiny_config(folder, family, ddp_bucket_size=bucket_size), dp=2)[0]
    assert got["buckets"] > 5
    for name, gradient in expected["gradients"].items():
        assert torch.equal(got["gradients"][name], gradient), name
    torch.testing.assert_close(torch.tensor(got["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0)


def starts_of_steps(mesh: Mesh, cfg: Config, frozen: str = "none") -> dict[str, Any]:
    """Two steps: (backward passes begun before, bucket) of each reduction, how many began before the step's end."""
    run = tiny_run(mesh, cfg)
    b = run.buffers
    for segment in b.segments:
        segment.parameter.requires_grad_(frozen not in segment.name)
    starts: list[tuple[int, int]] = []
    sent: list[Tensor] = []
    begun, before_finish = 0, []
    backward, start, finish = torch.autograd.backward, b._start, b.finish

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal begun
        begun += 1
        backward(*args, **kwargs)

    def recorded(bucket: Bucket) -> None:
        starts.append((begun, bucket.number))
        sent.append(b.grads[bucket.flat].clone())
        start(bucket)

    def finished() -> Tensor:
        before_finish.append(len(starts))
        for bucket, gradients in zip(b.buckets, sent, strict=False):
            assert torch.equal(b.grads[bucket.flat], gradients), f"bucket {bucket.number} was sent before it was whole"
        sent.clear()
        return finish()

    torch.autograd.backward, b._start, b.finish = counted, recorded, finished
    for step in (1, 2):
        train_step(run, step)
        sent.clear()
    names = [[s.name for s in b.segments if s.bucket is bucket] for bucket in b.buckets]
    return {"starts": starts, "before_finish": before_finish, "names": names}


SCHEDULES = [
    ("gpt2", "torch", 1, None),
    ("gpt2", "fused_linear", 1, None),
    ("llama", "fused_linear", 1, None),
    ("llama", "torch", 2, None),
    ("gpt2", "fused_linear", 2, "interleaved"),
    ("gpt_neox", "torch", 2, "zb-h1"),
    ("gpt2", "torch", 2, "zb-v"),
]


@pytest.mark.parametrize(("family", "loss", "pp", "schedule"), SCHEDULES)
def test_each_bucket_is_reduced_once_in_order_and_on_the_last_micro_batch(
    family: str, loss: str, pp: int, schedule: str | None, folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, ddp_bucket_size=SMALL, loss_backend=loss, pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
    )  # fmt: skip
    microbatches = 8 // 2
    for of_rank in run_ranks(starts_of_steps, cfg, dp=2, pp=pp):
        names = of_rank["names"]
        buckets = len(names)
        assert [number for _, number in of_rank["starts"]] == 2 * list(range(buckets))
        has_word = any(WORD in of_bucket for of_bucket in names)
        early = buckets - has_word
        assert early >= 2 and of_rank["before_finish"] == [early, buckets + early]
        assert not has_word or names[-1] == [WORD]
        if schedule is None:  # one chunk, one backward pass a micro-batch
            expected = [microbatches] * buckets + [2 * microbatches] * buckets
            if loss == "fused_linear" and names[0] == ["head.weight"]:
                expected[0] -= 1  # made by the last forward pass, before the last backward pass
                expected[buckets] -= 1
            assert [begun for begun, _ in of_rank["starts"]] == expected


def test_frozen_parameters_are_not_waited_for(folder: Path) -> None:
    cfg = tiny_config(folder, "gpt2", ddp_bucket_size=SMALL)
    for of_rank in run_ranks(starts_of_steps, cfg, "mlp", dp=2):
        early = len(of_rank["names"]) - 1
        assert of_rank["before_finish"] == [early, len(of_rank["names"]) + early]


def test_without_overlap_everything_waits_for_the_end(folder: Path) -> None:
    cfg = tiny_config(folder, "llama", ddp_bucket_size=SMALL, overlap_grad_reduce=False)
    for of_rank in run_ranks(starts_of_steps, cfg, dp=2):
        assert of_rank["before_finish"] == [0, len(of_rank["names"])]


def cut(mesh: Mesh, cfg: Config) -> None:
    """Assert that the parts of all ranks tile every bucket in equal aligned pieces, in the order of the model."""
    b = tiny_run(mesh, cfg).buffers
    assert b.buckets[0].flat.start == 0 and b.buckets[-1].flat.stop == b.size == len(b.params) == len(b.grads)
    owned = 0
    for bucket in b.buckets:
        length = (bucket.flat.stop - bucket.flat.start) // mesh.shards.size
        assert length % ALIGNMENT == 0 and bucket.part.stop - bucket.part.start == length
        assert bucket.part.start == bucket.flat.start + mesh.shards.rank * length
        assert bucket.owned == slice(owned, owned + length)
        owned += length
        inside = [s for s in b.segments if s.bucket is bucket]
        assert inside[0].begin == bucket.flat.start and inside[-1].end <= bucket.flat.stop
        assert [s.is_decayed for s in inside] == sorted((s.is_decayed for s in inside), reverse=True)
    layers = [int(s.name.split(".")[1]) for s in b.segments if s.name.startswith("layers.")]
    assert layers[0] == 2 and layers[-1] == 0
    assert len(b.owned_grads) == owned
    if mesh.shards.size == 1:
        assert b.owned_grads is b.grads
    for s in b.segments:
        count = torch.tensor(s.owned[1] - s.owned[0])
        if mesh.shards.size > 1:
            torch.distributed.all_reduce(count, group=mesh.shards.group)
        assert count == s.parameter.numel()
        assert s.parameter.data_ptr() == b.params[s.begin :].data_ptr()
        assert s.parameter.main_grad.data_ptr() == b.grads[s.begin :].data_ptr()

    for bucket in b.buckets:
        whole = torch.arange(bucket.flat.start, bucket.flat.stop)
        part = b.own_part(bucket, whole)
        assert torch.equal(part, torch.arange(bucket.part.start, bucket.part.stop))
        assert torch.equal(b.gather_flat(bucket, part), whole)


@pytest.mark.parametrize(("dp", "instances"), [(3, 1), (4, 2), (2, 2)])
def test_parts_tile_the_buckets(dp: int, instances: int, folder: Path) -> None:
    cfg = tiny_config(folder, "gpt2", ddp_bucket_size=SMALL, global_batch_size=12)
    run_ranks(cut, cfg, dp=dp, instances=instances)


def modules_wait(mesh: Mesh, cfg: Config) -> None:
    """Assert that no module runs before its own parameters have come, and that others may still be on their way."""
    run = tiny_run(mesh, cfg)
    b = run.buffers
    number_of = {id(s.parameter): s.bucket.number for s in b.segments}
    waiting: list[int] = []

    def look(module: torch.nn.Module, *_: Any) -> None:
        own = {number_of[id(parameter)] for parameter in module.parameters()}
        assert not own & b._gathers.keys(), f"{type(module).__name__} runs before bucket {own & b._gathers.keys()}"
        waiting.append(len(b._gathers))

    for chunk in run.chunks:
        for module in chunk.modules():
            if any(True for _ in module.parameters()) and module is not chunk:
                module.register_forward_pre_hook(look)
        chunk.register_forward_hook(look)
    for step in (1, 2):
        waiting.clear()
        train_step(run, step)
        assert any(waiting) == (step == 2 and cfg.parallel.overlap_param_gather)
        late = list(range(len(b.buckets))) if cfg.parallel.overlap_param_gather else []
        assert list(b._gathers) == late[::-1]  # what the next forward pass needs first comes first
    b.wait_params()
    for bucket in b.buckets:
        master = b.gather_flat(bucket, run.optimizer.master[bucket.owned])
        assert torch.equal(b.params[bucket.flat], master.to(b.params.dtype))


@pytest.mark.parametrize(
    ("family", "pp", "schedule", "overlap"),
    [("gpt_neox", 1, None, True), ("gpt2", 2, None, True), ("gpt2", 2, "zb-v", True), ("llama", 1, None, False)],
)
def test_modules_wait_for_their_own_parameters_only(
    family: str, pp: int, schedule: str | None, overlap: bool, folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, bf16=True, ddp_bucket_size=SMALL, overlap_param_gather=overlap, loss_backend="fused_linear",
        pipeline_model_parallel_size=pp, pipeline_schedule=schedule,
    )  # fmt: skip
    run_ranks(modules_wait, cfg, dp=2, pp=pp)


@pytest.mark.parametrize(
    ("family", "layout", "changes"),
    [
        ("gpt2", {"dp": 4, "instances": 2}, {"recompute_granularity": "selective"}),
        ("gpt2", {"dp": 2, "instances": 2, "pp": 2}, {"overlap_grad_reduce": False}),
        ("gpt2", {"dp": 2, "instances": 1, "pp": 2, "tp": 2}, {"sequence_parallel": True}),
        ("gpt2", {"dp": 2, "instances": 1, "pp": 2}, {"pipeline_schedule": "zb-v", "loss_backend": "fused_linear"}),
        ("gpt_neox", {"dp": 2, "instances": 2, "pp": 2}, {"pipeline_schedule": "zb-h1"}),
        (
            "gpt2",
            {"dp": 2, "instances": 1, "pp": 2},
            {"pipeline_schedule": "interleaved", "recompute_granularity": "full"},
        ),
        ("gpt_neox", {"dp": 4, "instances": 2, "tp": 2}, {"sequence_parallel": True, "overlap_param_gather": False}),
    ],
)
def test_shards_and_instances_train_like_one_process(
    family: str, layout: dict[str, int], changes: dict[str, Any], folder: Path
) -> None:
    """With matrices tied across stages and gradients that are partial over tensor-parallel ranks."""
    cfg = tiny_config(
        folder, family, ddp_bucket_size=SMALL, tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1), num_distributed_optimizer_instances=layout["instances"],
        **changes,
    )  # fmt: skip
    expected = alone(folder, family)
    for of_rank in run_ranks(training, cfg, **layout):
        for name, gradient in expected["gradients"].items():
            error = (of_rank["gradients"][name] - gradient).norm()
            # The key's part of a qkv bias is zero in theory: softmax does not see a shift that all keys share.
            scale = expected["norm"] if name.endswith("qkv.bias") else gradient.norm()
            assert error <= 1e-5 * scale, f"{name}: {error / scale:.2e}"
        for key in ("losses", "held_out"):
            torch.testing.assert_close(torch.tensor(of_rank[key]), torch.tensor(expected[key]), rtol=1e-5, atol=0)


@functools.cache
def alone(folder: Path, family: str) -> dict[str, Any]:
    result = run_ranks(training, tiny_config(folder, family))[0]
    return result | {"norm": torch.stack([g.norm() for g in result["gradients"].values()]).norm()}


@pytest.mark.parametrize(("dp", "instances"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_on_a_bf16_wire_are_those_of_fp32_within_its_rounding(
    bf16: bool, dp: int, instances: int, folder: Path
) -> None:
    """Each addend is rounded once, and each of the additions on the way once more."""
    both = []
    for in_fp32 in (True, False):
        cfg = tiny_config(
            folder, "llama", bf16=bf16, ddp_bucket_size=SMALL, accumulate_allreduce_grads_in_fp32=in_fp32,
            num_distributed_optimizer_instances=instances,
        )  # fmt: skip
        both.append(run_ranks(training, cfg, dp=dp, instances=instances)[0]["gradients"])
    differs = False
    for name, gradient in both[0].items():
        error = (both[1][name] - gradient).norm()
        assert error <= dp * EPS_BF16 * gradient.norm(), f"{name}: {error / gradient.norm():.2e}"
        differs |= not torch.equal(both[1][name], gradient)
    assert differs


def equal_parameters(mesh: Mesh, cfg: Config, frozen: str) -> None:
    """Train, and assert that the parameters of all replicas have the same bits and the frozen ones their first."""
    run = tiny_run(mesh, cfg)
    for segment in run.buffers.segments:
        if frozen and frozen in segment.name:
            segment.parameter.requires_grad_(False)
    run = dataclasses.replace(run, optimizer=ShardedOptimizer(run.buffers, Rules(cfg.optimizer, cfg.model)))
    before = run.buffers.params.clone()
    for step in range(1, STEPS + 1):
        train_step(run, step)
    run.buffers.wait_params()
    bits = run.buffers.params.view(torch.uint8)  # gloo knows no int16
    everyone = all_gather(bits, mesh.replicas).view(mesh.replicas.size, -1)
    assert (everyone == everyone[0]).all()
    for segment in run.buffers.segments:
        place = slice(segment.begin, segment.end)
        is_frozen = bool(frozen) and frozen in segment.name
        assert torch.equal(run.buffers.params[place], before[place]) == is_frozen, segment.name


@pytest.mark.parametrize(("frozen", "dp", "instances"), [("", 3, 1), ("mlp", 2, 1), ("embedding", 4, 2)])
@pytest.mark.parametrize("bf16", [True, False])
def test_replicas_stay_equal_bit_for_bit(frozen: str, dp: int, instances: int, bf16: bool, folder: Path) -> None:
    cfg = tiny_config(
        folder, "gpt2", bf16=bf16, ddp_bucket_size=SMALL, num_distributed_optimizer_instances=instances,
        global_batch_size=12, lr=0.01,
    )  # fmt: skip
    run_ranks(equal_parameters, cfg, frozen, dp=dp, instances=instances)
