"""What each operation must move or compute at the least: the bytes and FLOPs that rates are counted by."""


def norm_bytes(rows: int, hidden: int, residual_size: int, branch_size: int = 2) -> dict[str, int]:
    """Residual add and norm; sizes are bytes an element. Weights and statistics are left out (below 0.1%).

    Forward reads branch and residual, writes normed and residual. Backward reads d_normed, d_residual and the stream,
    writes the stream's gradient, and where the branch has another type the branch's beside it.
    """
    forward = 2 * branch_size + 2 * residual_size
    backward = branch_size + 3 * residual_size + (branch_size if branch_size != residual_size else 0)
    return _directions(rows * hidden * forward, rows * hidden * backward)


def bias_gelu_bytes(rows: int, ffn: int, size: int = 2) -> dict[str, int]:
    """Forward reads x and writes y, backward reads dy and x and writes dx; the bias and its gradient are left out."""
    return _directions(2 * rows * ffn * size, 3 * rows * ffn * size)


def gated_bytes(rows: int, ffn: int, size: int = 2) -> dict[str, int]:
    """Forward reads gate and linear and writes y, backward reads dy, gate and linear and writes two gradients."""
    return _directions(3 * rows * ffn * size, 5 * rows * ffn * size)


def rotary_bytes(tokens: int, width: int, size: int = 2) -> dict[str, int]:
    """Out of place over a packed QKV buffer: all of it is read and written; the tables stay in the cache."""
    return _directions(2 * tokens * width * size, 2 * tokens * width * size)


def cross_entropy_bytes(tokens: int, vocab: int, size: int = 2) -> dict[str, int]:
    """Forward reads the logits, backward reads them again and writes their gradient."""
    return _directions(tokens * vocab * size, 2 * tokens * vocab * size)


def adamw_bytes(parameters: int) -> dict[str, int]:
    """fp32 master and both moments read and written, fp32 gradient read, bf16 parameter written: 30 a parameter."""
    return {"step": 30 * parameters}


def attention_flops(batch: int, heads: int, length: int, head_dim: int) -> dict[str, int]:
    """Causal: half of 4 B h S^2 D forward, 2.5 times that backward (Dao 2023 counts so)."""
    forward = 2 * batch * heads * length * length * head_dim
    return _directions(forward, forward * 5 // 2)


def linear_cross_entropy_flops(tokens: int, hidden: int, vocab: int) -> dict[str, int]:
    """The three products that are needed: logits, gradient of the hidden states, gradient of the matrix."""
    return {"both": 6 * tokens * hidden * vocab}


def step_flops_per_token(layers: int, hidden: int, vocab: int, length: int, is_causal: bool) -> int:
    """Forward and backward of a GPT-2 for one token: 6 (12 L h^2 + V h) + 12 L h s; causal halves the latter."""
    attention = 12 * layers * hidden * length
    return 6 * (12 * layers * hidden**2 + vocab * hidden) + (attention // 2 if is_causal else attention)


def _directions(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "both": forward + backward}
