"""What the forward and backward kernels of attention share: tiles of heads, their rotation, borders of sequences."""

import triton
import triton.language as tl


@triton.jit
def rotation_channels(channel, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each channel: the other one of its pair, the row of its angle, and the sign of the other's sine term."""
    is_rotated = channel < 2 * HALF
    if INTERLEAVED:
        partner = tl.where(is_rotated, channel ^ 1, channel)
        angle = channel // 2
        sign = tl.where(channel % 2 == 0, -1.0, 1.0)
    else:
        is_first = channel < HALF
        partner = tl.where(is_first, channel + HALF, tl.where(is_rotated, channel - HALF, channel))
        angle = tl.where(is_first, channel, channel - HALF)
        sign = tl.where(is_first, -1.0, 1.0)
    return partner, angle, sign


@triton.jit
def load_angles(
    table, position, is_row, fill,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """cos (fill 1) or sin (fill 0) of each row's position for every channel; `fill` beyond the rotated channels."""
    if WIDE:
        part, i = tl.arange(0, BLOCK_D // HALF), tl.arange(0, HALF)
        at = table + position[:, None, None] * HALF + i[None, None, :] + 0 * part[None, :, None]
        found = tl.load(
            at, mask=is_row[:, None, None] & (part < 2)[None, :, None] & (i >= 0)[None, None, :], other=fill
        )
        found = tl.reshape(found, (ROWS, BLOCK_D))
    else:
        channel = tl.arange(0, BLOCK_D)
        _partner, angle, _sign = rotation_channels(channel, HALF, INTERLEAVED)
        at = table + position[:, None] * HALF + angle[None, :]
        found = tl.load(at, mask=is_row[:, None] & (channel[None, :] < 2 * HALF), other=fill)
    return found


@triton.jit
def rotate_in_place(
    head, offset, is_row, position, cos, sin,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rotate rows of one head where they lie, and return them, [ROWS, BLOCK_D].

    Each channel is loaded a second time as the other of its pair, which costs a hit in L1 and no exchange of registers.
    With WIDE, channels are [parts of HALF, HALF], so that the compiler sees that the swapped parts are contiguous.
    """
    if WIDE:
        part, i = tl.arange(0, BLOCK_D // HALF), tl.arange(0, HALF)
        swapped = tl.where(part < 2, 1 - part, part)
        sign = tl.where(part == 0, -1.0, tl.where(part == 1, 1.0, 0.0))[None, :, None]
        at = head + offset[:, None, None] + part[None, :, None] * HALF + i[None, None, :]
        swapped_at = head + offset[:, None, None] + swapped[None, :, None] * HALF + i[None, None, :]
        angle_at = position[:, None, None] * HALF + i[None, None, :] + 0 * part[None, :, None]
        is_used = is_row[:, None, None] & (part[None, :, None] >= 0) & (i >= 0)[None, None, :]
        has_angle = is_used & (part < 2)[None, :, None]
    else:
        channel = tl.arange(0, BLOCK_D)
        partner, angle, sign = rotation_channels(channel, HALF, INTERLEAVED)
        sign = sign[None, :]
        at = head + offset[:, None] + channel[None, :]
        swapped_at = head + offset[:, None] + partner[None, :]
        angle_at = position[:, None] * HALF + angle[None, :]
        is_used = is_row[:, None] & (channel[None, :] < D)
        has_angle = is_used & (channel[None, :] < 2 * HALF)
    x = tl.load(at, mask=is_used, other=0.0)
    other = tl.load(swapped_at, mask=is_used, other=0.0)
    cosine = tl.load(cos + angle_at, mask=has_angle, other=1.0)
    sine = tl.load(sin + angle_at, mask=has_angle, other=0.0)
    turned = (x.to(tl.float32) * cosine + other.to(tl.float32) * sine * sign).to(x.dtype)
    tl.debug_barrier()  # all threads have loaded before any of them stores
    tl.store(at, turned, mask=is_used)
    return tl.reshape(turned, (ROWS, BLOCK_D))


@triton.jit
def rotate_back(
    gradient, is_row, position, cos, sin,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rotate an fp32 tile [ROWS, BLOCK_D] by the negative angles."""
    partner, _angle, sign = rotation_channels(tl.arange(0, BLOCK_D), HALF, INTERLEAVED)
    other = tl.gather(gradient, tl.broadcast_to(partner[None, :], (ROWS, BLOCK_D)), 1)
    cosine = load_angles(cos, position, is_row, 1.0, ROWS, BLOCK_D, HALF, INTERLEAVED, WIDE)
    sine = load_angles(sin, position, is_row, 0.0, ROWS, BLOCK_D, HALF, INTERLEAVED, WIDE)
    return gradient * cosine - other * sine * sign[None, :]


@triton.jit
def load_tile(
    source, first, column, stride, limit,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first` of the head that starts at `column`; `source` is a pointer or, with TMA, a descriptor."""
    if TMA:
        tile = source.load([first, column])
    else:
        row = first + tl.arange(0, ROWS)
        channel = tl.arange(0, BLOCK_D)
        at = source + row.to(tl.int64)[:, None] * stride + column + channel[None, :]
        if MASKED:
            tile = tl.load(at, mask=(row < limit)[:, None] & (channel < D)[None, :], other=0.0)
        elif BLOCK_D != D:
            tile = tl.load(at, mask=(channel < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def load_row(source, head, first, tokens, ROWS: tl.constexpr, TMA: tl.constexpr):
    """ROWS entries from `first` of row `head` of an fp32 [heads, tokens]; 0 beyond the last token."""
    if TMA:
        values = tl.reshape(source.load([head, first]), (ROWS,))
    else:
        token = first + tl.arange(0, ROWS)
        values = tl.load(source + head.to(tl.int64) * tokens + token, mask=token < tokens, other=0.0)
    return values


@triton.jit
def sequence_start(start, token, tokens, length, PACKED: tl.constexpr):
    """First token of the sequence that a token (a scalar or a block of them) belongs to."""
    if PACKED:
        first = tl.load(start + token, mask=token < tokens, other=0)
    else:
        first = token - token % length
    return first


@triton.jit
def sequence_end(end, token, tokens, length, PACKED: tl.constexpr):
    """The token after the last of the sequence that a token (a scalar or a block of them) belongs to."""
    if PACKED:
        after = tl.load(end + token, mask=token < tokens, other=0)
    else:
        after = token - token % length + length
    return after


@triton.jit
def token_position(position, token, first, is_row, HAS_POSITION: tl.constexpr):
    """Row of the rotary table for each token: as given, or its place in the sequence."""
    if HAS_POSITION:
        place = tl.load(position + token, mask=is_row, other=0)
    else:
        place = tl.where(is_row, token - first, 0)
    return place


@triton.jit
def key_range(
    start, m, row, first, tokens, length, window, PACKED: tl.constexpr, WINDOWED: tl.constexpr, LEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, own=None, CONTEXT: tl.constexpr = False,
):  # fmt: skip
    """What a tile of queries from m sees: each row's first key, the tile's last key, and the borders of three loops.

    Key tiles from begin to full need a mask (LEAD: some rows see them in part), those up to the diagonal need none,
    those from there to the last key do again. With CONTEXT row i's own key, the last that it sees, is own[i], else i.
    """
    last_row = tl.minimum(m + BLOCK_M, tokens) - 1
    first_own, last_own = m, last_row
    if CONTEXT:
        first_own, last_own = tl.load(own + m), tl.load(own + last_row)
    lowest = first
    low_first = sequence_start(start, m, tokens, length, PACKED)
    low_last = sequence_start(start, last_row, tokens, length, PACKED)
    if WINDOWED:
        lowest = tl.maximum(lowest, row - window + 1)
        low_first = tl.maximum(low_first, m - window + 1)
        low_last = tl.maximum(low_last, last_row - window + 1)
    begin = low_first // BLOCK_N * BLOCK_N
    diagonal = first_own // BLOCK_N * BLOCK_N
    full = begin
    if LEAD:
        full = tl.minimum(tl.cdiv(low_last, BLOCK_N) * BLOCK_N, diagonal)
    return lowest, last_own, begin, full, diagonal


@triton.jit
def query_range(
    start, end, n, key, tokens, length, window, PACKED: tl.constexpr, WINDOWED: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    """What sees a tile of keys from n: each key's first query and the one after its last, and borders of three loops.

    Query tiles from begin to past_diagonal need a mask, those up to full need none, those from there to `after` do
    again (TAIL: some queries see the keys in part). With CONTEXT the first query to see key i is row start[i], else i.
    """
    last_key = tl.minimum(n + BLOCK_N, tokens) - 1
    highest = sequence_end(end, key, tokens, length, PACKED)
    high_first = sequence_end(end, n, tokens, length, PACKED)
    high_last = sequence_end(end, last_key, tokens, length, PACKED)
    if WINDOWED:
        highest = tl.minimum(highest, key + window)
        high_first = tl.minimum(high_first, n + window)
        high_last = tl.minimum(high_last, last_key + window)
    lowest, low_first, low_last = key, n, n + BLOCK_N - 1
    if CONTEXT:
        lowest = tl.load(start + key, mask=key < tokens, other=0)
        low_first, low_last = tl.load(start + n), tl.load(start + last_key)
    begin = low_first // BLOCK_M * BLOCK_M
    past_diagonal = tl.minimum(tl.cdiv(low_last, BLOCK_M) * BLOCK_M, high_last)
    full = tl.maximum(high_first // BLOCK_M * BLOCK_M, past_diagonal) if TAIL else high_last
    return lowest, highest, begin, past_diagonal, full, high_last
