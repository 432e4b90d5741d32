"""muP's own test, the coordinate check: what a few steps change in activations does not depend on the width.

Yang et al. 2022, arXiv 2203.03466, appendix D.1.
"""

from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, tiny_run
from torch import Tensor, nn

from megapoly.parallel.mesh import single_process_mesh
from megapoly.train.step import train_step


def changes(folder: Path, width: int, optimizer: str, use_mup: bool) -> dict[str, float]:
    """Root mean square of the change of each branch's output and of the logits over four steps at a fixed rate."""
    cfg = tiny_config(
        folder, "llama", num_layers=2, hidden_size=width, ffn_hidden_size=2 * width, num_attention_heads=4,
        micro_batch_size=8, use_mup=use_mup, mup_base_hidden_size=64, optimizer=optimizer, lr=3e-3, lr_warmup_iters=0,
        lr_decay_style="constant", clip_grad=0.0, weight_decay=0.0,
    )  # fmt: skip
    run = tiny_run(single_process_mesh(), cfg)
    model, tokens_BS = run.chunks[0], torch.from_numpy(run.loader.batch(0, 8)[0].tokens)
    seen: dict[str, Tensor] = {}

    def look() -> dict[str, Tensor]:
        def keep(name: str, module: nn.Module) -> None:
            module.register_forward_hook(lambda _, __, output: seen.update({name: output.detach().clone()}))

        for number, block in model.layers.items():
            keep(f"{number}.attention", block.attention)
            keep(f"{number}.mlp", block.mlp)
        with torch.no_grad():
            seen["logits"] = model.logits(model(tokens_BS))
        return dict(seen)

    before = look()
    for step in range(1, 5):
        train_step(run, step)
    return {name: (now - before[name]).square().mean().sqrt().item() for name, now in look().items()}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_activations_move_alike_at_every_width_in_mup_and_ever_more_without(optimizer: str, tmp_path: Path) -> None:
    in_mup = [changes(tmp_path, width, optimizer, use_mup=True) for width in (64, 128, 256, 512)]
    wide_without = changes(tmp_path, 512, optimizer, use_mup=False)
    narrow_without = changes(tmp_path, 64, optimizer, use_mup=False)
    for name in in_mup[0]:
        moved = [of_width[name] for of_width in in_mup]
        assert max(moved) < 2.5 * min(moved), f"{name} at widths 64 to 512: {moved}"
        assert wide_without[name] > 4 * narrow_without[name], name
