"""The whole training step of polylm-1.7b: python kernels/bench/step.py [--steps 20] [--backend attention=sdpa]

megapoly's own model, gradient buffers and optimizer, beside the GPT-2 of `transformers` at the same sizes: eager,
compiled, and with Liger-Kernel. Each runs in a process of its own. Weights and token ids are random; no file is read.
The peers keep bf16 weights and moments and no fp32 masters, which is less work than megapoly's 30 bytes a parameter.
"""

import argparse
import importlib.util
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from formulas import step_flops_per_token
from harness import NO_GPU, arguments, is_runnable
from results import LeftOut, default_path, environment, first_line, write_json
from torch import Tensor

IMPLEMENTATIONS = ("megapoly", "transformers eager", "transformers compile", "transformers liger")
# Dense bf16 peaks of the data sheets in TFLOP/s, by a part of the device's name; the first that fits.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312,
    "B200": 2250,
}  # fmt: skip
CLIP, LR, BETAS, EPS, DECAY = 1.0, 6e-5, (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True)
class Sizes:
    """A GPT-2 and its micro-batch."""

    layers: int = 24
    hidden: int = 2048
    heads: int = 16
    vocab: int = 256000
    length: int = 2048
    sequences: int = 8


@dataclass(frozen=True)
class Stepper:
    """A training step in three parts; `forward` takes token ids and labels and returns the mean loss."""

    forward: Callable[[Tensor, Tensor], Tensor]
    update: Callable[[], None]
    about: str


def megapoly(sizes: Sizes, device: torch.device, backends: dict[str, str]) -> Stepper:
    """This repository's model with fp32 main gradients, fp32 masters and the fp32 residual stream of PolyLM."""
    wanted = ("numpy", "yaml", "triton", "megapoly")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} cannot be imported; run from the repository by make bench-step"
        )
    from megapoly.config import load_config
    from megapoly.model.backends import choose_backends
    from megapoly.model.loss import masked_losses
    from megapoly.model.transformer import Transformer
    from megapoly.optim.clip import clip_coefficient
    from megapoly.optim.groups import Rules
    from megapoly.optim.sharded import ShardedOptimizer
    from megapoly.parallel.gradients import FlatBuffers
    from megapoly.parallel.mesh import single_process_mesh
    from megapoly.parallel.stage import make_stage
    from megapoly.parallel.tensor import Placement, sharded_parameters

    flags: dict[str, Any] = {
        "num_layers": sizes.layers, "hidden_size": sizes.hidden, "num_attention_heads": sizes.heads,
        "seq_length": sizes.length, "max_position_embeddings": sizes.length, "vocab_size": sizes.vocab,
    }  # fmt: skip
    cfg = load_config("polylm-1.7b", flags | {f"{name}_backend": backend for name, backend in backends.items()})
    mesh = single_process_mesh(device)
    chosen = choose_backends(cfg.precision, device)
    place = Placement(mesh.tp, False, torch.bfloat16, device)
    model = Transformer(cfg, sizes.vocab, make_stage([sizes.layers], 0), place, chosen)
    with torch.no_grad():
        for _, parameter, (shard,) in sharded_parameters(model):
            parameter.zero_() if shard.init == "zeros" else parameter.normal_(std=cfg.model.init_method_std)
            if shard.init == "ones":
                parameter.fill_(1.0)
    buffers = FlatBuffers([model], mesh, cfg.model.tied, cfg.parallel)
    optimizer = ShardedOptimizer(buffers, Rules(cfg.optimizer, cfg.model), chosen.adamw)
    mask_BS = torch.ones(sizes.sequences, sizes.length, device=device)
    num_tokens = mask_BS.sum()

    def forward(tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        buffers.begin(1)
        return masked_losses(model, model(tokens_BS), labels_BS, mask_BS, num_tokens)[0]

    def update() -> None:
        grad = buffers.finish()
        clip = clip_coefficient(optimizer.global_norm(grad), CLIP)
        optimizer.step(grad, LR, clip)

    return Stepper(forward, update, chosen.describe())


def transformers(sizes: Sizes, device: torch.device, variant: str, smoke: bool) -> Stepper:
    """GPT2LMHeadModel in bf16 with SDPA and torch's fused AdamW; its own loss, or Liger-Kernel's fused one."""
    if variant == "compile" and smoke:
        raise LeftOut("a smoke run compiles nothing")
    if variant == "liger":
        import liger_kernel  # noqa: F401  # before a model is made for it
    from transformers import AutoModelForCausalLM, GPT2Config
    from transformers import __version__ as version

    config = GPT2Config(
        vocab_size=sizes.vocab, n_positions=sizes.length, n_embd=sizes.hidden, n_layer=sizes.layers,
        n_head=sizes.heads, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16).train()
    loss = _liger_loss(model) if variant == "liger" else None
    called = torch.compile(model) if variant == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, DECAY, fused=True)

    def forward(tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        if loss is not None:
            hidden = model.transformer(input_ids=tokens_BS).last_hidden_state.flatten(0, 1)
            return loss(model.lm_head.weight, hidden, labels_BS.flatten())
        return called(input_ids=tokens_BS, labels=tokens_BS).loss  # it shifts the labels itself

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Stepper(forward, update, f"transformers {version}, bf16 weights and moments")


def _liger_loss(model: Any) -> Callable[..., Tensor]:
    """Put Liger-Kernel's LayerNorm into a GPT-2, for which it has no patch, and return its fused loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.LayerNorm):
                norm = LigerLayerNorm(child.normalized_shape[0], eps=child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
    return LigerFusedLinearCrossEntropyLoss(reduction="mean")


def measure(stepper: Stepper, sizes: Sizes, device: torch.device, steps: int, warmup: int) -> dict[str, Any]:
    """Median milliseconds of a step and its parts, loss of the last one, and the peak of memory."""
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(1)
    shape = (sizes.sequences, sizes.length + 1)
    batches = [torch.randint(0, sizes.vocab, shape, generator=generator, device=device) for _ in range(4)]
    marks: list[list[Any]] = []
    loss = torch.zeros(())

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for i in range(warmup + steps):
        ids = batches[i % len(batches)]
        some = [mark()]
        objective = stepper.forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        some.append(mark())
        objective.backward()
        some.append(mark())
        stepper.update()
        some.append(mark())
        loss = objective.detach()
        marks += [some] if i >= warmup else []
    if on_gpu:
        torch.cuda.synchronize()

    def between(a: int, b: int) -> float:
        return statistics.median(m[a].elapsed_time(m[b]) if on_gpu else 1e3 * (m[b] - m[a]) for m in marks)

    return {
        "step_ms": between(0, 3), "forward_ms": between(0, 1), "backward_ms": between(1, 2),
        "optimizer_ms": between(2, 3), "loss": loss.item(),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }  # fmt: skip


def run_here(name: str, options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Measure one implementation in this process."""
    device = torch.device("cpu") if options.smoke else torch.device("cuda", 0)
    told: dict[str, Any] = {"implementation": name, "note": ""}
    try:
        if name == "megapoly":
            stepper = megapoly(sizes, device, dict(pair.split("=", 1) for pair in options.backend))
        else:
            stepper = transformers(sizes, device, name.split()[1], options.smoke)
        told |= measure(stepper, sizes, device, options.steps, options.warmup)
        told["note"] = stepper.about
    except Exception as error:  # one that is absent or fails costs its own row alone
        told["note"] = first_line(error)
        return told
    tokens = sizes.sequences * sizes.length
    told["tokens_per_second"] = 1e3 * tokens / told["step_ms"]
    gpu = "" if options.smoke else torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAKS.items() if part in gpu), None)
    for key, is_causal in (("mfu", False), ("mfu_causal", True)):
        flops = step_flops_per_token(sizes.layers, sizes.hidden, sizes.vocab, sizes.length, is_causal)
        told[key] = told["tokens_per_second"] * flops / peak / 1e12 if peak else None
    if not math.isfinite(told["loss"]):
        told["note"] = f"WRONG: the loss is {told['loss']}; {told['note']}"
    return told


def run_fitting(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one implementation, at half the micro-batch as often as memory is too small."""
    sequences = options.sequences
    while True:
        told = run_apart(name, options, sequences)
        if sequences < options.sequences:
            told["note"] = f"{sequences} sequences, more do not fit; {told['note']}"
        if "OutOfMemoryError" not in told["note"] or sequences == 1:
            return told
        sequences //= 2


def run_apart(name: str, options: argparse.Namespace, sequences: int) -> dict[str, Any]:
    """Measure one implementation in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "step.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--here", name, "--json", str(file)]
        command += ["--micro-batch", str(sequences)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"implementation": name, "note": f"not finished after {options.timeout:g} s"}
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"implementation": name, "note": f"exit status {done.returncode}: {last[:160]}"}


def table(results: list[dict[str, Any]]) -> str:
    """The results as text."""
    columns = {
        "tokens/s": ("tokens_per_second", ".0f"), "MFU": ("mfu", ".1%"), "causal": ("mfu_causal", ".1%"),
        "step ms": ("step_ms", ".1f"), "forward": ("forward_ms", ".1f"), "backward": ("backward_ms", ".1f"),
        "optimizer": ("optimizer_ms", ".1f"), "peak GB": ("peak_gb", ".1f"), "loss": ("loss", ".3f"),
    }  # fmt: skip
    lines = [f"{'implementation':<22}" + "".join(f"{name:>10}" for name in columns)]
    for told in results:
        cells = ("-" if told.get(key) is None else format(told[key], form) for key, form in columns.values())
        lines.append(f"{told['implementation']:<22}" + "".join(f"{cell:>10}" for cell in cells) + f"  {told['note']}")
    return "\n".join(lines)


def main() -> int:
    """Measure all, print and write; the exit status."""
    parser = arguments("Times the training step of polylm-1.7b beside transformers.")
    parser.add_argument("--only", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=8, dest="sequences", help="sequences, all in one pass")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--backend", nargs="*", default=[], metavar="KEY=NAME", help="megapoly's, e.g. loss=triton")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one implementation may take")
    parser.add_argument("--here", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not is_runnable(options.smoke):
        return NO_GPU
    sizes = Sizes(length=options.length, sequences=options.sequences)
    if options.smoke:
        sizes, options.steps, options.warmup = Sizes(2, 64, 4, 512, 32, 2), 3, 1
    if options.here:
        options.json.write_text(json.dumps(run_here(options.here, options, sizes)), encoding="utf-8")
        return 0
    head = environment(options.smoke)
    print(f"{sizes} on {head['gpu']}, torch {head['torch']}{'; a smoke run measures nothing' * options.smoke}")
    path = options.json or (None if options.smoke else default_path(head["gpu"], "-step"))
    workers = ThreadPoolExecutor(2)
    results: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    apply = workers.map if options.smoke else map  # in this thread a signal ends the process that is measured too
    for told in apply(lambda name: run_fitting(name, options), options.only):
        results.append(told)
        print(table(results[-1:]), flush=True)
        if path is not None:  # each time: what was measured survives if this is killed
            write_json(path, {**head, "model": asdict(sizes), "steps": results})
    print(f"\n{table(results)}")
    print("MFU counts 6 (12 L h^2 + V h) + 12 L h s FLOPs a token, causal counts half of the last term")
    if path is not None:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
