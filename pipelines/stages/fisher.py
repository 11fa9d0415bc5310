"""Fisher information of the baseline's matrices: squared gradients of the loss, summed over sequences one at a time. Of what lies outside the
blocks, a matrix with a row for each token of a vocabulary, squared gradients at the outputs alone.

One block is in memory at a time. Forward, what enters each block is kept for as many sequences as there is room for; backward from the head
down, each block is computed again, its gradients squared, reduced to row and column means and dropped. Knows the baseline; what the numbers
are for is the methods' business.
Legend: N sequences, T tokens, D model width, O out, I in, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...compress.statistics import Fisher
from ..errors import InputError
from ..evaluation.perplexity import LOGITS_AT_ONCE
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates, Room
from ..models.structure import Site
from ..ranks.exchange import Ranks
from ..recipes.sections import Calibration
from ..store.kept import is_whole, keep, kept
from .context import Context, check_stop

VERSION = 3
"""File of the numbers, next to the baseline."""
Sums = dict[str, tuple[Tensor, Tensor]]
"""Site → Σ over sequences of the squared gradient's row means [O] and column means [I], float64."""


@dataclass(frozen=True)
class OutputSquares:
    """Σ over sequences and their tokens of the mean loss's squared gradient, float64: at what the token embeddings look up, [D], and at the
    logits as the head puts them out, [V]; the loss's cross-entropy makes the latter (p − y)². None where the model has no such module."""

    looked_up_D: Tensor | None
    logits_V: Tensor | None


def fisher_diagonal(context: Context) -> dict[str, Fisher]:
    """Site name → Fisher (arXiv:2311.12023, section 3.2), on the CPU; stored next to the baseline for the next method."""
    result = {name: tensor for name, tensor in _squares(context).items() if not name.startswith(_OUTSIDE)}
    names = {key.rpartition(".")[0] for key in result}
    return {n: Fisher(result[f"{n}.row"], result[f"{n}.column"]) for n in names}


def output_squares(context: Context) -> OutputSquares:
    """Of the token embeddings and the head, from the same walk and file, on the CPU."""
    result = _squares(context)
    return OutputSquares(result.get(f"{_OUTSIDE}looked_up"), result.get(f"{_OUTSIDE}logits"))


def nats_per_square(calibration: Calibration) -> float:
    """What a sum over sequences and tokens of squared gradients of the mean loss weighs: half of it times this, times a squared error of the
    output it is taken at (its mean over tokens), is nats per token, to second order. Gradients of tokens hardly depend on one another, and the
    loss is a mean over tokens, so the sum lacks a factor of predicted tokens per sequence / sequences."""
    return (calibration.seq_len - 1) / calibration.samples


_OUTSIDE = "outside blocks "
"""Begins the names of tensors that are no site's."""


def _squares(context: Context) -> dict[str, Tensor]:
    """By their names in the file."""
    path, ranks = _kept(context), context.ranks
    if ranks.broadcast(ranks.leads and is_whole(path)):
        result = kept(path)
        if result is None:
            raise InputError(f"{path}: rank 0 finds it whole and rank {ranks.rank} does not; the ranks need one file system")
        return result[0]
    sums, outside = _collect(context)
    if not any(bool(row_O.any()) for row_O, _ in sums.values()):
        raise InputError(
            "Fisher information is 0 everywhere: the loss does not depend on any matrix; check the calibration text and the model"
        )
    tensors = {f"{n}.{kind}": t.float() for n, pair in sums.items() for kind, t in zip(("row", "column"), pair, strict=True)}
    squares = {"looked_up": outside.looked_up_D, "logits": outside.logits_V}
    tensors |= {f"{_OUTSIDE}{name}": tensor for name, tensor in squares.items() if tensor is not None}
    if ranks.leads:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, tensors)
    ranks.barrier()
    return tensors


def _kept(context: Context) -> Path:
    place = f"{context.device.type}-{str(dtype_of_gradients(context)).removeprefix('torch.')}"
    return context.baseline_metrics / f"fisher-{VERSION}-{context.inputs.calibration_fingerprint()[:8]}-{place}.safetensors"


def dtype_of_gradients(context: Context) -> torch.dtype:
    """The run's; a mean's gradients underflow in float16, whose range is too small for them."""
    return torch.float32 if context.dtype == torch.float16 else context.dtype


def _collect(context: Context) -> tuple[Sums, OutputSquares]:
    """Sums on the CPU. They do not depend on how many sequences run at once, nor on which rank has which (sequence n: rank n % size): every sum is
    over one sequence after the other."""
    model = StreamedModel(context.baseline, context.device, dtype_of_gradients(context))
    sites = [site for site in model.structure.sites if site.block is not None]
    sums: Sums = {s.name: (torch.zeros(s.shape[0], dtype=torch.float64), torch.zeros(s.shape[1], dtype=torch.float64)) for s in sites}
    ranks = context.ranks
    squares = _OutputSums(model, ranks)
    ids_NT = context.inputs.calibration()
    room = Room.measured(context.device, context.scratch, ranks.size)
    parts = ids_NT.split(min(ranks.gathered(sequences_at_once(model, ids_NT, room))) * ranks.size)
    with bar("Fisher information, blocks there and back", 2 * model.structure.blocks * len(parts)) as shown:

        def step() -> None:
            shown.advance()
            check_stop(context)

        for part_NT in parts:
            own = [part_NT[number : number + 1] for number in range(ranks.rank, len(part_NT), ranks.size)]
            entering = there(model, own, room, step)
            with squares.at_logits():
                gradients = HiddenStates.of(head_gradients(model, entering.pop(), own, squares.sums), room)
            squares.sums.settle()
            for index in model.walk(backward=True):
                _backward(model, index, entering.pop(), gradients, sums, ranks)
                step()
            for place, (ids_1T, gradient_1TD) in enumerate(zip(own, gradients, strict=True)):
                squares.sums.place = place
                squares.look_up(ids_1T, gradient_1TD)
            squares.sums.settle()
    return sums, squares.result()


@dataclass
class Ordered:
    """Totals by name to which every sequence of a part adds, one after the other, whichever rank has it: place p of rank r is sequence
    p · size + r."""

    ranks: Ranks
    totals: dict[str, Tensor]
    place: int = 0
    waiting: dict[int, list[tuple[str, Tensor]]] = field(default_factory=dict)

    def add(self, name: str, part: Tensor) -> None:
        if self.ranks.size == 1:
            self.totals[name] += part
        else:
            self.waiting.setdefault(self.place * self.ranks.size + self.ranks.rank, []).append((name, part.cpu()))

    def settle(self) -> None:
        """At the end of a part, on every rank."""
        for parts in self.ranks.in_order(self.waiting).values():
            for name, part in parts:
                self.totals[name] += part.to(self.totals[name].device)
        self.waiting.clear()


def sequences_at_once(model: StreamedModel, ids_NT: Tensor, room: Room) -> int:
    """How many sequences' states, one for each block and their gradients, fit into memory at once; one goes to files if it must."""
    of_one = (model.structure.blocks + 2) * ids_NT.shape[1] * model.model.config.get_text_config().hidden_size * model.dtype.itemsize
    return max(1, int(min(room.memory_bytes // of_one, len(ids_NT))))


def there(model: StreamedModel, own: Sequence[Tensor], room: Room, step: Callable[[], None]) -> list[HiddenStates]:
    """What enters each block, and what leaves the last one, sequence by sequence."""
    states = [HiddenStates.of(map(model.embed, own), room)]
    with torch.no_grad():
        for index in model.walk():
            states.append(HiddenStates.of(map(partial(model.run_block, index), states[-1]), room))
            step()
    return states


def head_gradients(model: StreamedModel, leaving: HiddenStates, own: Sequence[Tensor], sums: Ordered) -> Iterator[Tensor]:
    """The mean loss's gradient at what leaves the last block, for each sequence; logits of a span of tokens at a time."""
    for place, (hidden_1TD, ids_1T) in enumerate(zip(leaving, own, strict=True)):
        ids_T, sums.place = ids_1T[0], place
        leaf_1TD, count = hidden_1TD.detach().requires_grad_(True), len(ids_T) - 1
        for start in range(0, count, LOGITS_AT_ONCE):
            stop = min(start + LOGITS_AT_ONCE, count)
            logits_TV = model.logits(leaf_1TD[:, start:stop])[0].float()
            loss = nn.functional.cross_entropy(logits_TV, ids_T[start + 1 : stop + 1].to(logits_TV.device), reduction="sum") / count
            loss.backward()
        assert leaf_1TD.grad is not None
        yield leaf_1TD.grad


def _backward(model: StreamedModel, index: int, entering: HiddenStates, gradients: HiddenStates, sums: Sums, ranks: Ranks) -> None:
    """Add a loaded block's squared gradients, and put the gradient at what enters it in the place of that at what leaves it."""
    sites = model.structure.of_block(index)
    here = Ordered(ranks, {f"{site.name}.{n}": t.to(model.device) for site in sites for n, t in enumerate(sums[site.name])})
    by_parameter: dict[str, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(f"{site.module}.{site.parameter}", []).append(site)
    for name, members in by_parameter.items():
        parameter = model.model.get_parameter(name)
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(_consume(members, here))
    for number, (hidden_1TD, gradient_1TD) in enumerate(zip(entering, gradients, strict=True)):
        here.place, leaf_1TD = number, hidden_1TD.detach().requires_grad_(True)
        model.run_block(index, leaf_1TD).backward(gradient_1TD)
        assert leaf_1TD.grad is not None
        gradients.put(number, leaf_1TD.grad)
    here.settle()
    for site in sites:
        sums[site.name] = here.totals[f"{site.name}.0"].cpu(), here.totals[f"{site.name}.1"].cpu()


def _consume(members: list[Site], sums: Ordered) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for site in members:
            squares_OI = site.read(parameter.grad).float().square()
            for n, dimension in enumerate((1, 0)):
                sums.add(f"{site.name}.{n}", squares_OI.mean(dimension).double())
        parameter.grad = None

    return hook


class _OutputSums:
    """Adds up the squared gradients of `OutputSquares` on the model's device."""

    def __init__(self, model: StreamedModel, ranks: Ranks) -> None:
        self.model = model
        table, head = model.structure.embeddings, model.structure.head
        self.table = None if table is None else model.model.get_submodule(table.module)
        self.head = None if head is None else model.model.get_submodule(head.module)
        lengths = ({} if table is None else {"looked up": table.shape[1]}) | ({} if head is None else {"logits": head.shape[0]})
        totals = {name: torch.zeros(length, dtype=torch.float64, device=model.device) for name, length in lengths.items()}
        self.sums = Ordered(ranks, totals)

    def result(self) -> OutputSquares:
        return OutputSquares(*(None if t is None else t.cpu() for t in map(self.sums.totals.get, ("looked up", "logits"))))

    @contextmanager
    def at_logits(self) -> Iterator[None]:
        """While open, what goes back through the head counts."""

        def count(gradient: Tensor) -> None:
            self.sums.add("logits", torch.linalg.vector_norm(gradient.flatten(0, -2), dim=0, dtype=torch.float32).double().square())

        def watch(module: nn.Module, args: object, out: Tensor) -> None:
            out.register_hook(count)

        handle = None if self.head is None else self.head.register_forward_hook(watch)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def look_up(self, ids_1T: Tensor, gradient_1TD: Tensor) -> None:
        """A sequence, with the gradient at what enters the first block. What a table's module puts out may be a multiple of its rows (Gemma's
        is √D times as long), and the model's own code stands between that and the block."""
        if self.table is None:
            return
        outs: list[Tensor] = []

        def leaf(module: nn.Module, args: object, out: Tensor) -> Tensor:
            outs.append(out.detach().requires_grad_(True))
            return outs[-1]

        handle = self.table.register_forward_hook(leaf)
        try:
            self.model.embed_with_gradients(ids_1T).backward(gradient_1TD)
        finally:
            handle.remove()
        rows_1TD, out_1TD, at_out = self.table.weight[ids_1T.to(self.model.device)].float(), outs[0].detach().float(), outs[0].grad
        assert at_out is not None
        times = (rows_1TD * out_1TD).sum() / rows_1TD.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        self.sums.add("looked up", (times * at_out.float()).double().square().sum((0, 1)))
