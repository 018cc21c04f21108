"""Weights to levels of 8 or 4 bits in plain PyTorch, as every CPU backend computes them, to the bit.

Every operation is rounded on its own but the sum of a group's squares, which has an order of its own: blocks of 128
columns, in each of them sixteen running sums (column i adds to sum i % 16), which a tree adds up, and another tree the
blocks. A tree adds its second half to its first until one is left; zeros fill it up to a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks_quantized as _checks

LANES, BLOCK = 16, 128
PART = 2**20  # elements: all that is tried for a part stays in L2, 1.7 to 2.5 x as fast as parts of 2**24
FIRST_ROWS = 16  # of a weight, which tell of most that it was not quantised before
# Divisors of a group's largest value that are tried for its scale. Clipping it pays at 4 bits: on a layer of SmolLM2 in
# groups of 64 the root of the squared error falls from 8.0 % to 6.7 %, at 8 bits from 0.44 to 0.40 %.
DIVISORS = {8: (127.0, 127.5, 128.0, 129.0), 4: tuple(6.5 + 0.25 * step for step in range(18))}


def quantize(weight: Tensor, bits: int, group: int = 0, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _checks.check_quantize("quantize", weight, bits, group, importance)
    size = max(1, PART // weight.shape[1])
    parts = [_quantize(part, bits, group, importance) for part in weight.split(size)]
    levels, scales = (torch.cat(one) for one in zip(*parts, strict=True))
    return levels, scales


def _quantize(weight: Tensor, bits: int, group: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    group, groups = _groups(cols, group)
    counts = None if importance is None else pad(importance, (0, -cols % group)).view(groups, group)
    values = pad(weight.float(), (0, -cols % group)).view(rows, groups, group)
    largest = values.abs().amax(dim=2, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("wanda::quantize: weight holds NaN or inf: it cannot be quantised")
    highest = 0.99 * torch.finfo(weight.dtype).max / (1 << (bits - 1))  # or its lowest value would become -inf
    unit = power_of_two(largest)
    scale = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for divisor in torch.tensor(DIVISORS[bits], device=weight.device):
        tried = (largest / divisor).clamp(max=highest).bfloat16().float()
        error = levels_of(values, tried, bits).mul_(tried).sub_(values).div_(unit)  # squares may overflow
        squares = error.square_() if counts is None else error.square_().mul_(counts)
        total = sum_of(squares).unsqueeze(2)
        is_less = total < least
        scale, least = torch.where(is_less, tried, scale), torch.where(is_less, total, least)
    levels = levels_of(values, scale, bits).to(torch.int8).view(rows, groups * group)[:, :cols]
    return levels.contiguous(), scale.squeeze(2).bfloat16()


def _groups(cols: int, group: int) -> tuple[int, int]:
    """Columns of a group, and how many groups a row has."""
    group = min(group or cols, cols)
    return group, -(-cols // group)


def levels_of(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers, float32; 0 where the scale is 0."""
    most = 1 << (bits - 1)
    whole = (values / scale.where(scale > 0, 1.0)).round_().clamp_(-most, most - 1)
    return whole.where(scale > 0, 0.0)


def power_of_two(largest: Tensor) -> Tensor:
    """At or below it, at least the smallest normal float32: what is divided by it keeps its bits."""
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp(min=torch.finfo(torch.float32).tiny)


def sum_of(squares: Tensor) -> Tensor:
    """[.., n] -> [..]"""
    width = min(BLOCK, -(-squares.shape[-1] // LANES) * LANES)
    blocks = pad(squares, (0, -squares.shape[-1] % width)).unflatten(-1, (-1, width // LANES, LANES))
    lanes = blocks[..., 0, :]
    for step in range(1, width // LANES):
        lanes = lanes + blocks[..., step, :]
    return _tree(_tree(lanes))


def _tree(sums: Tensor) -> Tensor:
    """[.., n] -> [..]"""
    count = 1 << (sums.shape[-1] - 1).bit_length()
    sums = pad(sums, (0, count - sums.shape[-1]))
    while count > 1:
        count //= 2
        sums = sums[..., :count] + sums[..., count:]
    return sums[..., 0]


def exact_levels(weight: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    _checks.check_quantize("exact_levels", weight, bits, group)
    rows, cols = weight.shape
    levels = torch.zeros(rows, cols, dtype=torch.int8, device=weight.device)
    scales = torch.zeros(rows, _groups(cols, group)[1], dtype=torch.bfloat16, device=weight.device)
    begins = [0, *range(FIRST_ROWS, rows, max(1, PART // cols)), rows]
    are_exact = True
    for part in map(slice, begins[:-1], begins[1:]):
        levels[part], scales[part], are_exact = _exact(weight[part], bits, group)
        if not are_exact:
            break
    return levels, scales, torch.tensor(are_exact, device=weight.device)


def _exact(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, bool]:
    """A group's largest weight is a level times its scale, rounded to the weight's dtype: each level is tried, and each
    scale that this rounding may hide."""
    rows, cols = weight.shape
    group, groups = _groups(cols, group)
    values = pad(weight, (0, -cols % group)).view(rows * groups, group)
    scale = torch.zeros(len(values), 1, dtype=torch.bfloat16, device=weight.device)
    left = values.any(dim=1).nonzero()[:, 0]  # groups, by number
    for level in torch.arange(1 << (bits - 1), 0, -1, dtype=torch.float32, device=weight.device):
        near = (values[left].float().abs().amax(dim=1, keepdim=True) / level).bfloat16()
        for step in (0, 1, -1):
            tried = (near.view(torch.int16) + step).view(torch.bfloat16)
            unit = tried.float()
            is_exact = (levels_of(values[left].float(), unit, bits) * unit).to(weight.dtype) == values[left]
            is_found = is_exact.all(dim=1) & (tried > 0)[:, 0]
            scale[left[is_found]] = tried[is_found]
            left, near = left[~is_found], near[~is_found]
    levels = levels_of(values.float(), scale.float(), bits).to(torch.int8).view(rows, groups * group)[:, :cols]
    return levels, scale.view(rows, groups), len(left) == 0


def pack_kept_(values: Tensor, levels: Tensor, mask: Tensor, starts: Tensor, bits: int) -> None:
    _checks.check_pack_kept("pack_kept_", values, levels, mask, starts, bits)
    stored = levels.view(torch.uint8) + (1 << (bits - 1))  # uint8 wraps
    counts = _checks.stored_counts(mask.sum(dim=1), bits)
    uneven = (torch.diff(starts) != counts) | (starts[:-1] < 0) | (starts[1:] > len(values))
    _checks.check_kept("pack_kept_", int(uneven.sum()))
    first, total = int(starts[0]), int(counts.sum())
    if bits == 8:
        values[first : first + total] = stored[mask]
        return
    # Half after half, in the order of its rows: where a pair's bytes are taken by this half, and by what.
    begins = (starts[:-1] - first).repeat_interleave(counts)
    place = torch.arange(total, dtype=torch.int32, device=levels.device) - begins
    packed = torch.zeros(total, dtype=torch.uint8, device=levels.device)
    for half, shift in ((slice(0, None, 2), 0), (slice(1, None, 2), 4)):
        own = mask[half].sum(dim=1, dtype=torch.int32)
        own = pad(own, (0, len(counts) - len(own)))
        is_taken = place < own.repeat_interleave(counts)
        packed |= torch.zeros_like(packed).masked_scatter_(is_taken, stored[half][mask[half]] << shift)
    values[first : first + total] = packed
