"""Guided second moments of a stage's matrices: how much the dense model's loss feels each token at their outputs, and their inputs weighed by it.

Gradients come from one walk there and back over the calibration text, kept with the baseline; inputs from the compressed model below, block by
block, as for every other statistic. Knows models, text and ranks; the maths is `compress/guided`.
Legend: N windows, T tokens, O out, I in, K groups of rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...compress.guided import row_groups, token_weights, weighted
from ...compress.statistics import InputStatistics
from ..errors import InputError
from ..evaluation.perplexity import batches
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.collecting import Watch
from ..models.hidden import HiddenStates, Room
from ..models.sharding import BatchShare
from ..models.structure import Site
from ..ranks.exchange import OrderedSum
from ..store.kept import is_whole, keep, kept
from .context import Context, check_stop
from .fisher import Ordered, dtype_of_gradients, head_gradients, sequences_at_once, there

VERSION = 1
"""Of the numbers kept with the baseline."""
TokenSquares = dict[int, dict[str, Tensor]]
"""Window → site → mean squared gradients, float32 [T, K], on the CPU."""


@dataclass(frozen=True)
class Guidance:
    """`weights`: of every guided matrix, [N, T, K]; `moments`: of those whose inputs were collected last."""

    weights: Mapping[str, Tensor]
    moments: dict[str, tuple[InputStatistics, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Context, groups: Mapping[str, int]) -> "Guidance":
        """For matrices by name, each in so many groups."""
        squares = token_squares(context, groups)
        return cls({name: token_weights(s_NTK.flatten(0, 1)).view(s_NTK.shape) for name, s_NTK in squares.items()})

    @contextmanager
    def watching(self, model: StreamedModel, sites: Sequence[Site], share: BatchShare) -> Iterator[Watch | None]:
        """`moments` of the guided among the sites, from a walk over a loaded block's batches while this is open. InputError for one that is not
        called once for every token."""
        self.moments.clear()
        chosen = [site for site in sites if site.name in self.weights]
        if not chosen:
            yield None
            return
        windows, length = next(iter(self.weights.values())).shape[:2]
        watch = _Weighing(self.weights, chosen, model.device, share, [*batches(windows, length)])
        handles = [model.model.get_submodule(site.module).register_forward_pre_hook(partial(watch.add, site)) for site in chosen]
        try:
            yield watch
        finally:
            for handle in handles:
                handle.remove()
        for site in chosen:
            empty = InputStatistics(site.shape[1], _MOMENT, model.device)
            self.moments[site.name] = tuple(empty.with_moment(total.total() / (windows * length)) for total in watch.sums[site.name])


class _Weighing:
    """Sums of one walk, slot by slot; `parts` are the windows of every batch."""

    def __init__(
        self, weights: Mapping[str, Tensor], sites: Sequence[Site], device: torch.device, share: BatchShare, parts: Sequence[slice]
    ) -> None:
        self.weights, self.sites, self.device, self.share, self.parts = weights, sites, device, share, parts
        self.sums = {site.name: [_square_sum(site, device, share) for _ in range(weights[site.name].shape[2])] for site in sites}
        self.now, self.own = slice(0), self._empty()

    def _empty(self) -> dict[str, list[InputStatistics]]:
        return {s.name: [InputStatistics(s.shape[1], _MOMENT, self.device) for _ in self.sums[s.name]] for s in self.sites}

    def enter(self, place: int) -> None:
        self.now = self.parts[self.share.numbers[place]]

    def add(self, site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TI, weights_TK = args[0].detach().reshape(-1, site.shape[1]), self.weights[site.name][self.now].flatten(0, 1)
        if len(x_TI) != len(weights_TK):
            raise InputError(
                f"{site.name}: is called with {len(x_TI)} rows for {len(weights_TK)} tokens, so none has a gradient; set guided: 0 for it"
            )
        weighted(self.own[site.name], x_TI, weights_TK)

    def end_slot(self) -> None:
        for name, totals in self.sums.items():
            for total, statistics in zip(totals, self.own[name], strict=True):
                total.add(statistics.moment_sum_II)
        self.own = self._empty()


_MOMENT = frozenset({"second_moment"})


def _square_sum(site: Site, device: torch.device, share: BatchShare) -> OrderedSum:
    return OrderedSum(share.ranks, torch.zeros(1, device=device).expand(site.shape[1], site.shape[1]))


def token_squares(context: Context, groups: Mapping[str, int]) -> dict[str, Tensor]:
    """Site → mean over each group's outputs of the squared gradient of the window's summed cross-entropy over its length, float32 [N, T, K] on the
    CPU, of those that every window reaches; kept with the baseline for the next stage that asks for the same groups. InputError where a gradient is not finite."""
    path, ranks = _kept(context, groups), context.ranks
    if ranks.broadcast(ranks.leads and is_whole(path)):
        result = kept(path)
        if result is None:
            raise InputError(f"{path}: rank 0 finds it whole and rank {ranks.rank} does not; the ranks need one file system")
        return result[0]
    squares = _collect(context, groups)
    for name, squares_NTK in squares.items():
        if not bool(torch.isfinite(squares_NTK).all()):
            raise InputError(
                f"{name}: the loss's gradient at its outputs holds NaN or Inf; the checkpoint is damaged, or {context.dtype} too narrow"
            )
    if ranks.leads:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, squares)
    ranks.barrier()
    return squares


def _kept(context: Context, groups: Mapping[str, int]) -> Path:
    place = f"{context.device.type}-{str(dtype_of_gradients(context)).removeprefix('torch.')}"
    chosen = hashlib.sha256(json.dumps(sorted(groups.items())).encode()).hexdigest()[:8]
    return context.baseline_metrics / f"guidance-{VERSION}-{context.inputs.calibration_fingerprint()[:8]}-{chosen}-{place}.safetensors"


def _collect(context: Context, groups: Mapping[str, int]) -> dict[str, Tensor]:
    """On every rank; window n is walked by rank n % size, alone."""
    model, ranks = StreamedModel(context.baseline, context.device, dtype_of_gradients(context)), context.ranks
    ids_NT, squares_of, first = context.inputs.calibration(), TokenSquares(), 0
    room = Room.measured(context.device, context.scratch, ranks.size)
    parts = ids_NT.split(min(ranks.gathered(sequences_at_once(model, ids_NT, room))) * ranks.size)
    with bar("gradients of tokens, blocks there and back", 2 * model.structure.blocks * len(parts)) as shown:

        def step() -> None:
            shown.advance()
            check_stop(context)

        for part_NT in parts:
            numbers = range(ranks.rank, len(part_NT), ranks.size)
            own = [part_NT[number : number + 1] for number in numbers]
            entering = there(model, own, room, step)
            gradients = HiddenStates.of(head_gradients(model, entering.pop(), own, Ordered(ranks, {})), room)
            for index in model.walk(backward=True):
                here = {site: groups[site.name] for site in model.structure.of_block(index) if site.name in groups}
                _backward(model, index, entering.pop(), gradients, here, [squares_of.setdefault(first + number, {}) for number in numbers])
                step()
            first += len(part_NT)
    everyones = ranks.in_order(squares_of)
    reached = [name for name in groups if all(name in squares for squares in everyones.values())]
    return {name: torch.stack([squares[name] for squares in everyones.values()]) for name in reached}


def _backward(
    model: StreamedModel, index: int, entering: HiddenStates, gradients: HiddenStates, groups: Mapping[Site, int], squares_of: Sequence[dict[str, Tensor]]
) -> None:  # fmt: skip
    """Into `squares_of` what a loaded block's matrices get of every window, and the gradient at what enters the block in the place of that at what leaves
    it."""
    now = [0]

    def watch(site: Site, count: int) -> Callable[[nn.Module, object, Tensor], None]:
        def square(gradient: Tensor) -> None:
            squares_TO = gradient.detach().reshape(-1, site.shape[0]).float().square()
            squares_of[now[0]][site.name] = torch.stack([squares_TO[:, rows].mean(1) for rows in row_groups(site.shape[0], count)], 1).cpu()

        def forward(module: nn.Module, args: object, out: Tensor) -> None:
            out.register_hook(square)

        return forward

    handles = [model.model.get_submodule(site.module).register_forward_hook(watch(site, count)) for site, count in groups.items()]
    try:
        for number, (hidden_1TD, gradient_1TD) in enumerate(zip(entering, gradients, strict=True)):
            now[0], leaf_1TD = number, hidden_1TD.detach().requires_grad_(True)
            model.run_block(index, leaf_1TD).backward(gradient_1TD)
            assert leaf_1TD.grad is not None
            gradients.put(number, leaf_1TD.grad)
    finally:
        for handle in handles:
            handle.remove()
