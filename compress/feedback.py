"""Error compensation: columns are rounded one after another, and later columns are updated to compensate each column's error.

The engine under GPTQ (arXiv:2210.17323), GPTQ on a code book, and SparseGPT (arXiv:2301.00774). It knows a factor of the inverse
second moment and a rule that rounds a column; not what a grid or a mask is.
Weights run as [I, O] here, in processing order, so that a column of the layer is one contiguous row.
Legend: O out, I in, S columns of a sub-block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .settling import settle_columns_
from .statistics import InputStatistics

BLOCK = 128
_INNER = 32  # columns updated one by one before a matrix product carries their errors on
_SETTLED, _SETTLED_NARROW, _NARROW = 64, 128, 1024
"""Columns that are rounded at once, and of a matrix with so few rows, whose products take less time than it takes to ask for them."""
_ROWS = 8192  # of a matrix that go through a sweep at once on the CPU: what a block works on then stays in its cache
_MAX_DAMP = 10.0

RoundRow = Callable[[int, Tensor, Tensor], None]
"""(i, w [O], out [O]): write the level of column i of the sub-block into `out`; its value is level·scale."""
OpenColumns = Callable[[int, int, Tensor], tuple[Tensor, RoundRow]]
"""(start, stop, weight [I, O] as updated so far) → (scale [S, O], the rounding of these columns)."""


@dataclass(frozen=True)
class InverseFactor:
    """H⁻¹ = Uᵀ·U of the damped second moment H, its columns in processing order.

    unit_II is U with every row divided by its diagonal, diagonal_I that diagonal; `order_I` names the original column at each
    place, `place_I` is its inverse; `damp` is the multiple of the mean diagonal that was needed; `dead` counts inputs that are always 0.
    """

    unit_II: Tensor
    diagonal_I: Tensor
    order_I: Tensor
    place_I: Tensor
    damp: float
    dead: int


@dataclass(frozen=True)
class GivenGrids:
    """Uniform grids of all groups, scale and zero [G, O], in the processing order of the columns: `group_I` int64 names each column's group.
    A weight that `keep_IO` (bool) drops has only the level 0. Codes are 0…`top`; with `float_zeros` a zero is no code."""

    scale_GO: Tensor
    zero_GO: Tensor
    group_I: Tensor
    keep_IO: Tensor | None
    top: int
    float_zeros: bool


def inverse_factor(second_moment_II: Tensor, damp: float = 0.01, by_diagonal: bool = False) -> InverseFactor:
    """Factor a second moment [I, I], symmetric and positive semi-definite, in its own dtype.

    `damp` times the mean diagonal is added to the diagonal and raised until a Cholesky factorization exists. `by_diagonal` orders
    the columns by falling diagonal (act-order). A dead input gets the mean diagonal: it is rounded to nearest and disturbs nobody
    (GPTQ's code sets its weights to 0, which costs all texts but the calibration's). ValueError for NaN or Inf, or when no damping helps.
    """
    diagonal_I = second_moment_II.diagonal()
    if not bool(torch.isfinite(second_moment_II).all()):
        raise ValueError("second moment holds NaN or Inf; the calibration inputs overflowed or the model is broken")
    dead_I = diagonal_I <= 0
    live = int((~dead_I).sum())
    mean = diagonal_I[~dead_I].mean().item() if live else 1.0
    order_I = diagonal_I.argsort(descending=True, stable=True) if by_diagonal else torch.arange(len(diagonal_I), device=dead_I.device)
    moment_II = second_moment_II.index_select(0, order_I).index_select(1, order_I) if by_diagonal else second_moment_II.clone()
    del second_moment_II, diagonal_I  # a moment is the largest thing there is: gigabytes for a wide input
    moment_II.diagonal().add_(dead_I[order_I].to(moment_II.dtype) * mean)
    used = damp
    while True:
        upper_II = _factor(moment_II, used * mean)
        if upper_II is not None:
            break
        used = max(used * 3, 1e-4)
        if not used <= _MAX_DAMP:  # NaN, too, ends here
            raise ValueError(f"second moment has no Cholesky factor even with damp {_MAX_DAMP:g}; it is not positive semi-definite")
    diagonal = upper_II.diagonal().clone()
    place_I = torch.empty_like(order_I)
    place_I[order_I] = torch.arange(len(order_I), device=order_I.device)
    return InverseFactor(upper_II.div_(diagonal.unsqueeze(1)), diagonal, order_I, place_I, used, len(order_I) - live)


def factor_of(inputs: InputStatistics, damp: float, by_diagonal: bool, smooth_I: Tensor | None = None) -> InverseFactor:
    """`inverse_factor` of an input's second moment, computed once for all matrices that read the input.

    With `smooth` the base sees x/smooth, which other matrices do not share: nothing is kept then.
    """
    if smooth_I is not None:
        scale_I = smooth_I.float()
        return inverse_factor(inputs.second_moment_II / (scale_I.unsqueeze(1) * scale_I), damp, by_diagonal)
    key = (damp, by_diagonal)
    if key not in inputs.factors:
        inputs.factors[key] = inverse_factor(inputs.second_moment_II, damp, by_diagonal)
    return inputs.factors[key]


@dataclass(frozen=True)
class _SweepTensors:
    """What a sweep writes: levels [I, O], a block's errors [S, O], each row's loss [O]; `origin_IO` are the weights before the sweep, toward
    which `pull` draws them, None where it is 0."""

    levels_IO: Tensor
    error_SO: Tensor
    loss_O: Tensor
    origin_IO: Tensor | None
    pull: float

    @classmethod
    def of(cls, weight_IO: Tensor, block: int, pull: float) -> "_SweepTensors":
        origin_IO = weight_IO.clone() if pull else None
        return cls(torch.empty_like(weight_IO), torch.empty_like(weight_IO[:block]), torch.zeros_like(weight_IO[0]), origin_IO, pull)


def feed_back_(
    weight_IO: Tensor, factor: InverseFactor, open_columns: OpenColumns, periods: tuple[int, ...], block: int = BLOCK, pull: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Round every column and carry its error on; `weight_IO` is left with every column as it was when its turn came.

    `pull` β > 0 is FOEM's first-order term (arXiv:2507.11017, as its authors' code runs it): when its turn comes a column goes back by
    the share β of the way that errors have moved it, and β of what is left of that way is not carried on.

    A rule that looks at a whole group when it reaches its first column names the group's length among the `periods`: that group then
    holds all the errors of the columns before it, whatever `block` is. Returns (levels [I, O], Σ(error/U_jj)² of every row [O]), the
    latter being diag((W − Q)·H·(W − Q)ᵀ) with the damped H.
    """
    sweep = _SweepTensors.of(weight_IO, block, pull)
    for start, stop in _blocks(len(weight_IO), periods, block):
        own = replace(sweep, error_SO=sweep.error_SO[: stop - start])
        _feed_back_block_(weight_IO, own, factor.unit_II, factor.diagonal_I, open_columns, periods, start, stop)
        _carry_on_(weight_IO, factor, own.error_SO, start, stop)
    return sweep.levels_IO, sweep.loss_O


def feed_back_uniform_(
    weight_IO: Tensor, factor: InverseFactor, grids: GivenGrids, block: int = BLOCK, pull: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`feed_back_` with all grids known beforehand: nothing but the block's own numbers is needed to round it, so that it is one operator,
    `bitmend::feed_back_block_`, of which a card has a kernel (kernels/column_sweep)."""
    outputs = weight_IO.shape[1]
    if weight_IO.device.type == "cpu" and outputs > _ROWS:
        return _in_parts_(weight_IO, factor, grids, block, pull, part_rows(outputs))
    sweep = _SweepTensors.of(weight_IO, block, pull)
    # On the CPU the loop is called by name: what counts operators then sees its own.
    run = feed_back_block_ if weight_IO.device.type == "cpu" else torch.ops.bitmend.feed_back_block_
    for start, stop in _blocks(len(weight_IO), (), block):
        error_SO = sweep.error_SO if stop - start == len(sweep.error_SO) else sweep.error_SO[: stop - start]
        run(
            weight_IO, sweep.levels_IO, error_SO, sweep.loss_O, factor.unit_II, factor.diagonal_I, grids.scale_GO, grids.zero_GO,
            grids.group_I, grids.keep_IO, sweep.origin_IO, start, stop, grids.top, grids.float_zeros, pull,
        )  # fmt: skip
        _carry_on_(weight_IO, factor, error_SO, start, stop)
    return sweep.levels_IO, sweep.loss_O


def part_rows(outputs: int) -> int:
    """Rows of a part, where so many are swept in parts of about one size."""
    return -(-outputs // -(-outputs // _ROWS))


def feed_back_block_(
    weight_IO: Tensor, levels_IO: Tensor, error_SO: Tensor, loss_O: Tensor, unit_II: Tensor, diagonal_I: Tensor, scale_GO: Tensor,
    zero_GO: Tensor, group_I: Tensor, keep_IO: Tensor | None, origin_IO: Tensor | None, start: int, stop: int, top: int, float_zeros: bool,
    pull: float,
) -> None:  # fmt: skip
    """Round the columns [start, stop) and carry their errors on among themselves: into `weight_IO`, `levels_IO` and `error_SO` [stop − start,
    O]; `loss_O` grows by theirs. group_I int64 names each column's row of scale and zero; `origin_IO` are the weights before the sweep,
    read where `pull` is not 0: then one column after the other, else many at once. The slow twin of the kernel."""
    if pull:

        def open_columns(first: int, last: int, updated_IO: Tensor) -> tuple[Tensor, RoundRow]:
            groups = group_I[first:last]
            return uniform_rounding(scale_GO[groups], zero_GO[groups], top, float_zeros, None if keep_IO is None else keep_IO[first:last])

        sweep = _SweepTensors(levels_IO, error_SO, loss_O, origin_IO, pull)
        _feed_back_block_(weight_IO, sweep, unit_II, diagonal_I, open_columns, (), start, stop)
        return
    groups = group_I[start:stop]
    grid = [scale_GO[groups], zero_GO[groups]]
    if keep_IO is not None and not float_zeros:
        keep_SO, zero_SO = keep_IO[start:stop], grid[1]
        grid += [torch.where(keep_SO, 0, zero_SO), torch.where(keep_SO, top, zero_SO)]
    width = _SETTLED_NARROW if weight_IO.shape[1] <= _NARROW else _SETTLED
    parts = zip(*(t.split(width) for t in (weight_IO[start:stop], levels_IO[start:stop], error_SO, *grid)), strict=True)
    for first, (weight, levels, error, *own) in zip(range(start, stop, width), parts, strict=True):
        last = first + len(weight)
        settle_columns_(weight, levels, error, unit_II[first:last, first:last], top, *own)
        if last < stop:
            weight_IO[last:stop].addmm_(unit_II[first:last, last:stop].T, error, alpha=-1)
    _add_loss_(loss_O, error_SO, diagonal_I[start:stop])


OPERATORS = torch.library.Library("bitmend", "DEF")
OPERATORS.define(
    "feed_back_block_(Tensor(a!) weight_IO, Tensor(b!) levels_IO, Tensor(c!) error_SO, Tensor(d!) loss_O, Tensor unit_II, Tensor diagonal_I, "
    "Tensor scale_GO, Tensor zero_GO, Tensor group_I, Tensor? keep_IO, Tensor? origin_IO, int start, int stop, int top, bool float_zeros, "
    "float pull) -> ()"
)
OPERATORS.impl("feed_back_block_", feed_back_block_, "CompositeExplicitAutograd")


def uniform_rounding(scale_SO: Tensor, zero_SO: Tensor, top: int, float_zeros: bool, keep_SO: Tensor | None) -> tuple[Tensor, RoundRow]:
    """Levels counted from the zero point (code − zero); a dropped weight has only the level 0."""
    if float_zeros:
        zeros = zero_SO.unbind()

        def round_to_float_zeros(i: int, w: Tensor, out: Tensor) -> None:
            torch.div(w, scales[i], out=out)
            out.add_(zeros[i]).round_().clamp_(0, top).sub_(zeros[i])

        scales = scale_SO.unbind()
        return scale_SO, round_to_float_zeros
    low_SO, high_SO = -zero_SO, top - zero_SO
    if keep_SO is not None:
        low_SO, high_SO = low_SO * keep_SO, high_SO * keep_SO
    limits = list(zip(scale_SO, low_SO, high_SO, strict=True))

    def round_row(i: int, w: Tensor, out: Tensor) -> None:
        scale, low, high = limits[i]
        torch.div(w, scale, out=out)
        torch.clamp(out.round_(), low, high, out=out)

    return scale_SO, round_row


def _carry_on_(weight_IO: Tensor, factor: InverseFactor, error_SO: Tensor, start: int, stop: int) -> None:
    """The errors of a block into all columns behind it, by one product."""
    if stop < len(weight_IO):
        weight_IO[stop:].addmm_(factor.unit_II[start:stop, stop:].T, error_SO, alpha=-1)


def _feed_back_block_(
    weight_IO: Tensor, sweep: _SweepTensors, unit_II: Tensor, diagonal_I: Tensor, open_columns: OpenColumns, periods: tuple[int, ...],
    start: int, stop: int,
) -> None:  # fmt: skip
    for first, last in _sub_blocks(start, stop, periods):
        part_SO = sweep.error_SO[first - start : last - start]
        scale_SO, round_row = open_columns(first, last, weight_IO)
        if sweep.origin_IO is not None:
            round_row = _pulled(round_row, sweep.origin_IO[first:last], sweep.pull)
        _round_columns(weight_IO[first:last], sweep.levels_IO[first:last], part_SO, scale_SO, unit_II[first:last, first:last], round_row)
        if last < stop:
            weight_IO[last:stop].addmm_(unit_II[first:last, last:stop].T, part_SO, alpha=-1)
    _add_loss_(sweep.loss_O, sweep.error_SO, diagonal_I[start:stop])


def _add_loss_(loss_O: Tensor, error_SO: Tensor, diagonal_S: Tensor) -> None:
    loss_O += (error_SO / diagonal_S.unsqueeze(1)).square_().sum(0)


def _in_parts_(weight_IO: Tensor, factor: InverseFactor, grids: GivenGrids, block: int, pull: float, rows: int) -> tuple[Tensor, Tensor]:
    """`feed_back_uniform_` of so many rows of the matrix at a time, which do not know each other."""
    levels_IO, losses = torch.empty_like(weight_IO), []
    for start in range(0, weight_IO.shape[1], rows):
        own = (slice(None), slice(start, start + rows))
        scale_GO, zero_GO = grids.scale_GO[own].contiguous(), grids.zero_GO[own].contiguous()
        few = replace(grids, scale_GO=scale_GO, zero_GO=zero_GO, keep_IO=None if grids.keep_IO is None else grids.keep_IO[own].contiguous())
        part_IO = weight_IO[own].contiguous()
        levels_IO[own], loss_O = feed_back_uniform_(part_IO, factor, few, block, pull)
        weight_IO[own] = part_IO
        losses.append(loss_O)
    return levels_IO, torch.cat(losses)


def _round_columns(weight_SO: Tensor, levels_SO: Tensor, error_SO: Tensor, scale_SO: Tensor, unit_SS: Tensor, round_row: RoundRow) -> None:
    """The only loop over single columns: five small operations each."""
    for i, (w, level, error, scale, unit_S) in enumerate(zip(weight_SO, levels_SO, error_SO, scale_SO, unit_SS, strict=True)):
        round_row(i, w, level)
        torch.addcmul(w, level, scale, value=-1, out=error)
        if i + 1 < len(weight_SO):
            weight_SO[i + 1 :].addr_(unit_S[i + 1 :], error, alpha=-1)


def _pulled(round_row: RoundRow, origin_SO: Tensor, pull: float) -> RoundRow:
    """The rounding of columns that are drawn toward their origin, before the choice and before the error is taken."""

    def round_pulled(i: int, w: Tensor, out: Tensor) -> None:
        w.lerp_(origin_SO[i], pull)
        round_row(i, w, out)
        w.lerp_(origin_SO[i], pull)

    return round_pulled


def _blocks(count: int, periods: tuple[int, ...], block: int) -> Iterator[tuple[int, int]]:
    """Lazy blocks of at most `block` columns: a group that begins inside one also ends inside it."""
    start = 0
    while start < count:
        stop, previous = min(start + block, count), -1
        while stop != previous:
            previous = stop
            for period in periods:
                begin = (stop - 1) // period * period
                if begin > start and min(begin + period, count) > stop:
                    stop = begin
        yield start, stop
        start = stop


def _sub_blocks(start: int, stop: int, periods: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of at most _INNER columns inside which no group begins."""
    while start < stop:
        end = min([stop, start + _INNER, *((start // period + 1) * period for period in periods)])
        yield start, end
        start = end


def _factor(moment_II: Tensor, ridge: float) -> Tensor | None:
    """Upper U with (H + ridge)⁻¹ = UᵀU, or None: H = R·Rᵀ with R upper is one Cholesky of H read backwards, and U = R⁻¹."""
    damped_II = moment_II.flip(0, 1)
    damped_II.diagonal().add_(ridge)
    lower_II, info = torch.linalg.cholesky_ex(damped_II)
    del damped_II
    if int(info) != 0:
        return None
    upper_II = lower_II.flip(0, 1)
    del lower_II
    upper_II = upper_II.contiguous()  # by columns, as the factor comes, the inverse would be summed in another order
    upper_II = _invert_upper(upper_II)
    return upper_II if bool(torch.isfinite(upper_II).all()) else None


def _invert_upper(upper_II: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix by halves: most of the work is matrix products. A card solves larger ones in little time."""
    count = len(upper_II)
    if count <= (256 if upper_II.device.type == "cpu" else 2048):
        return torch.linalg.solve_triangular(upper_II, torch.eye(count, dtype=upper_II.dtype, device=upper_II.device), upper=True)
    half = count // 2
    out = torch.zeros_like(upper_II)
    out[:half, :half], out[half:, half:] = _invert_upper(upper_II[:half, :half]), _invert_upper(upper_II[half:, half:])
    out[:half, half:] = out[:half, :half] @ upper_II[:half, half:] @ out[half:, half:]
    out[:half, half:].neg_()
    return out
