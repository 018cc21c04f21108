"""The packed formats: what is kept, where it is, and what a sound file looks like. Lossless: only +0 is left out.

========  =======================================================  =====================================
bitmap    one bit per weight, and the weights that are not +0      9/16 of bfloat16 at 50 %
2:4       two weights of every four, and two bits for each         9/16 of bfloat16
========  =======================================================  =====================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _backend
from .._checks import FLOATS

FORMATS = ("bitmap", "2:4")
COLUMNS = 64  # what is packed has a multiple of them: see padded()
MOST_VALUES = 2**31 - 1  # of a bitmap, whose row starts are int32
PADDING = 32  # values that kernels may read past the last one of a bitmap
_PART = 2**26  # elements
_INTEGERS = {4: torch.int32, 2: torch.int16}


def padded(weight: Tensor) -> Tensor:
    """[.., C_in] with zeros up to a multiple of 64 columns: of a weight, which keeps none of them, and of what it is
    multiplied with."""
    more = -weight.shape[-1] % COLUMNS
    return pad(weight, (0, more)) if more else weight


def check_width(x: Tensor, cols: int) -> None:
    """Raises ValueError where x is not [.., cols], as the operators do: before it is filled up."""
    if x.shape[-1] != cols:
        raise ValueError(f"x must be [.., {cols}], got {list(x.shape)}")


def bits_of(weight: Tensor) -> Tensor:
    """As integers: what copies 16-bit floats may quiet a NaN."""
    return weight.contiguous().view(_INTEGERS[weight.element_size()])


def kept(weight: Tensor) -> Tensor:
    """[C_out, C_in] bool: every weight but +0 (-0.0 is kept)."""
    return bits_of(weight) != 0


def _in_triton(name: str, weight: Tensor) -> bool:
    return weight.is_cuda and _backend.cuda_kernels(name) == "triton"


def pack_bitmap(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[C_out, C_in] -> (values [kept + 32], bitmap [C_out, C_in / 8], starts [C_out + 1])."""
    _check_columns(weight)
    mask = kept(weight)
    counts = counts_of(mask)
    if int(counts.sum()) > MOST_VALUES:
        raise ValueError(f"weight {_too_many(int(counts.sum()))}")
    starts = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = counts.cumsum(0)
    if _in_triton("pack_bitmap", weight):
        values = weight.new_zeros(int(starts[-1]) + PADDING)
        return values, _backend.in_triton("pack_bitmap")(bits_of(weight), starts, bits_of(values)), starts
    values = torch.cat([weight.contiguous()[mask], weight.new_zeros(PADDING)])
    return values, bitmap_of(mask), starts


def bitmap_of(mask: Tensor) -> Tensor:
    """[C_out, C_in] bool -> [C_out, C_in / 8] uint8."""
    # A product of 64 bits brings bit 0 of byte i to bit 56 + i, and no other there: 10 x as fast as a sum of eight.
    return (mask.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def counts_of(mask: Tensor) -> Tensor:
    """[C_out, C_in] bool -> how many columns each row keeps, int64."""
    # Eight words of eight bytes add up byte by byte, and a product brings the bytes' sum to the highest: of 13.8 M
    # columns 2 ms, where a sum of bool takes 75.
    words = padded(mask).view(torch.int64).unflatten(1, (-1, 8)).sum(dim=2)
    return (words * 0x0101010101010101 >> 56).sum(dim=1)


def join_bitmaps(bitmaps: Sequence[tuple[Tensor, ...]], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """The bitmap of matrices of one width that lie one below the other."""
    values, codes, starts = zip(*bitmaps, strict=True)
    begins = torch.cat([torch.diff(one) for one in starts]).cumsum(0, dtype=torch.int32)
    joined = torch.cat([*(one[:-padding] for one in values), values[0].new_zeros(padding)])
    return joined, torch.cat(codes), torch.cat([begins.new_zeros(1), begins])


def parts(weight: Tensor) -> Iterator[Tensor]:
    """A weight in parts of some rows, for what takes more memory than the weight."""
    yield from weight.split(max(1, _PART // weight.shape[1]))


def is_24(weight: Tensor) -> bool:
    """Whether no four columns keep more than two weights."""
    if weight.shape[1] % 4:
        return False
    return all(bool((kept(part).view(part.shape[0], -1, 4).sum(dim=2) <= 2).all()) for part in parts(weight))


def pack_sparse24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[C_out, C_in] -> (values [C_out, C_in / 2], indices [C_out, C_in / 8])."""
    _check_columns(weight)
    pack = _backend.in_triton("pack_sparse24") if _in_triton("pack_sparse24", weight) else _pack_sparse24
    values, indices, most = pack(bits_of(weight))
    if most > 2:
        raise ValueError(f"weight is not 2:4: four of its columns keep {most} weights")
    return values.view(weight.dtype), indices


def _pack_sparse24(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """(values, indices, how many columns of a group are kept at most) of integers."""
    columns, indices = indices_of(weight)
    groups = weight.view(weight.shape[0], -1, 4)
    return groups.gather(2, columns).flatten(1), indices, int((groups != 0).sum(dim=2).max())


def indices_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[C_out, C_in] -> (two columns of each four [C_out, C_in / 4, 2], the same as codes [C_out, C_in / 8] uint8): what
    is kept first, then as many zeros as make two; both in the order of their columns."""
    mask = (weight if not weight.is_floating_point() else bits_of(weight)).view(weight.shape[0], -1, 4) != 0
    columns = torch.sort(mask.int(), dim=2, descending=True, stable=True).indices[..., :2].sort(dim=2).values
    codes = (columns[..., 0] | columns[..., 1] << 2).view(weight.shape[0], -1, 2)
    return columns, (codes[..., 0] | codes[..., 1] << 4).to(torch.uint8)


def validate_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> None:
    """Raises ValueError unless the counts fit: kernels read what they say without looking again."""
    _check_types(values, "bitmap", bitmap)
    if starts.dtype != torch.int32:
        raise ValueError(f"its row starts must be int32, they are {starts.dtype}")
    counts = population(bitmap)
    expected = torch.zeros(bitmap.shape[0] + 1, dtype=torch.int64, device=bitmap.device)
    expected[1:] = counts.cumsum(0)
    if starts.shape != expected.shape or not torch.equal(starts.long(), expected):
        raise ValueError("its row starts do not fit its bitmap")
    if values.shape != (int(expected[-1]) + PADDING,):
        raise ValueError(f"its bitmap keeps {int(expected[-1])} weights, {values.numel() - PADDING} are there")


def validate_sparse24(values: Tensor, indices: Tensor) -> None:
    """Raises ValueError unless each group's indices ascend."""
    _check_types(values, "indices", indices)
    check_indices(indices)
    if values.shape != (indices.shape[0], indices.shape[1] * 4):
        raise ValueError(
            f"its indices want {indices.shape[0]} x {indices.shape[1] * 4} values, got {list(values.shape)}"
        )


def check_indices(indices: Tensor) -> None:
    """Raises ValueError unless each group's two ascend."""
    codes = torch.stack([indices & 15, indices >> 4], dim=-1)
    if bool(((codes & 3) >= (codes >> 2)).any()):
        raise ValueError("a group's two indices do not ascend")


def packed_bytes(weight: Tensor, form: str) -> int:
    """What a weight takes in a format."""
    rows, cols = weight.shape
    if form == "2:4":
        return rows * (cols // 2 * weight.element_size() + cols // 8)
    return (_count(weight) + PADDING) * weight.element_size() + rows * (cols // 8) + 4 * (rows + 1)


def check_format(wanted: str) -> None:
    """Raises ValueError for what is no format."""
    if wanted not in ("auto", *FORMATS):
        raise ValueError(f"format must be auto, {' or '.join(FORMATS)}, got '{wanted}'")


def choose_format(
    weight: Tensor,
    wanted: str = "auto",
    size_of: Callable[[Tensor, str], int] = packed_bytes,
) -> str | None:
    """The smaller format that fits (2:4 before a bitmap of its size), or None where a weight would not shrink.

    Args:
        wanted: ``auto``, or one of the formats: None then where that one does not fit or would not shrink.
        size_of: bytes of a weight in a format.
    """
    check_format(wanted)
    dense = weight.numel() * weight.element_size()
    weight = padded(weight)
    forms = ["2:4"] if wanted != "bitmap" and is_24(weight) else []
    forms += ["bitmap"] if wanted != "2:4" and _values_beyond(weight) == 0 else []
    sizes = {form: size_of(weight, form) for form in forms}
    best = min(sizes, key=lambda form: sizes[form], default=None)
    return best if best is not None and sizes[best] < dense else None


def why_dense(weight: Tensor, wanted: str = "auto") -> str:
    """Why :func:`choose_format` gives None for a weight, in words."""
    cols, weight = weight.shape[1], padded(weight)
    if wanted == "2:4" and not is_24(weight):
        return "four of its columns keep more than two weights"
    if wanted != "2:4" and (many := _values_beyond(weight)):
        return f"it {_too_many(many)}"
    few = "too few of its weights are zero to shrink it"
    return f"{few}: prune it first" if cols == weight.shape[1] else f"{few}, filled up from {cols} inputs"


def _count(weight: Tensor) -> int:
    """How many weights are not +0."""
    return sum(int(kept(part).sum()) for part in parts(weight))


def _values_beyond(weight: Tensor) -> int:
    """How many weights are not +0, where they are more than a bitmap counts, or 0."""
    if weight.numel() <= MOST_VALUES:
        return 0
    many = _count(weight)
    return many if many > MOST_VALUES else 0


def _too_many(values: int) -> str:
    return f"keeps {values} values, a bitmap counts up to {MOST_VALUES}"


def population(bitmap: Tensor) -> Tensor:
    """[C_out, C_in / 8] uint8 -> the bits set in each row."""
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=bitmap.device)
    return table[bitmap.int()].sum(dim=1, dtype=torch.int64)


def _check_types(values: Tensor, name: str, codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"its {name} must be uint8 in two dimensions, got {codes.dtype} {list(codes.shape)}")
    if values.dtype not in FLOATS:
        raise ValueError(f"its values must be float32, bfloat16 or float16, they are {values.dtype}")


def _check_columns(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] % COLUMNS or weight.numel() == 0:
        raise ValueError(f"weight must be [C_out, C_in] with C_in a multiple of {COLUMNS}, got {list(weight.shape)}")
    if weight.element_size() not in _INTEGERS or not weight.is_floating_point():
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
