"""Fisher information of the baseline's matrices: squared gradients of the loss, summed over sequences one at a time. Of what lies outside the
blocks, a matrix with a row for each token of a vocabulary, squared gradients at the outputs alone.

One block is in memory at a time. Forward, what enters each block is kept for as many sequences as there is room for; backward from the head
down, each block is computed again, its gradients squared, reduced to row and column means and dropped. Knows the baseline; what the numbers
are for is the methods' business.
Legend: N sequences, T tokens, D model width, O out, I in, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from ..recipes.sections import Calibration
from ..store.kept import keep, kept
from .context import Context, check_stop

VERSION = 3
"""Of the numbers kept beside the baseline."""
Sums = dict[str, tuple[Tensor, Tensor]]
"""Site → Σ over sequences of the squared gradient's row means [O] and column means [I], float64."""


@dataclass(frozen=True)
class OutputSquares:
    """Σ over sequences and their tokens of the mean loss's squared gradient, float64: at what the token embeddings look up, [D], and at the
    logits as the head puts them out, [V]; the loss's cross-entropy makes the latter (p − y)². None where the model has no such module."""

    looked_up_D: Tensor | None
    logits_V: Tensor | None


def fisher_diagonal(context: Context) -> dict[str, Fisher]:
    """Site name → Fisher (arXiv:2311.12023, section 3.2), on the CPU; kept beside the baseline for the next method."""
    found = {name: tensor for name, tensor in _found(context).items() if not name.startswith(_OUTSIDE)}
    names = {key.rpartition(".")[0] for key in found}
    return {n: Fisher(found[f"{n}.row"], found[f"{n}.column"]) for n in names}


def output_squares(context: Context) -> OutputSquares:
    """Of the token embeddings and the head, from the same walk and file, on the CPU."""
    found = _found(context)
    return OutputSquares(found.get(f"{_OUTSIDE}looked_up"), found.get(f"{_OUTSIDE}logits"))


def nats_per_square(calibration: Calibration) -> float:
    """What a sum over sequences and tokens of squared gradients of the mean loss weighs: half of it times this, times a squared error of the
    output it is taken at (its mean over tokens), is nats per token, to second order. Gradients of tokens hardly depend on one another, and the
    loss is a mean over tokens, so the sum lacks a factor of predicted tokens per sequence / sequences."""
    return (calibration.seq_len - 1) / calibration.samples


_OUTSIDE = "outside blocks "
"""Begins the names of tensors that are no site's."""


def _found(context: Context) -> dict[str, Tensor]:
    """By their names in the file."""
    path = _kept(context)
    if (found := kept(path)) is not None:
        return found[0]
    sums, outside = _collect(context)
    if not any(bool(row_O.any()) for row_O, _ in sums.values()):
        raise InputError(
            "Fisher information is 0 everywhere: the loss does not depend on any matrix; check the calibration text and the model"
        )
    tensors = {f"{n}.{kind}": t.float() for n, pair in sums.items() for kind, t in zip(("row", "column"), pair, strict=True)}
    squares = {"looked_up": outside.looked_up_D, "logits": outside.logits_V}
    tensors |= {f"{_OUTSIDE}{name}": tensor for name, tensor in squares.items() if tensor is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    keep(path, tensors)
    return tensors


def _kept(context: Context) -> Path:
    place = f"{context.device.type}-{str(_dtype(context)).removeprefix('torch.')}"
    return context.baseline_metrics / f"fisher-{VERSION}-{context.inputs.calibration_fingerprint()[:8]}-{place}.safetensors"


def _dtype(context: Context) -> torch.dtype:
    """The run's; a mean's gradients underflow in float16, whose range is too small for them."""
    return torch.float32 if context.dtype == torch.float16 else context.dtype


def _collect(context: Context) -> tuple[Sums, OutputSquares]:
    """Sums on the CPU. They do not depend on how many sequences go together: every sum is over one sequence after the other."""
    model = StreamedModel(context.baseline, context.device, _dtype(context))
    sites = [site for site in model.structure.sites if site.block is not None]
    sums: Sums = {s.name: (torch.zeros(s.shape[0], dtype=torch.float64), torch.zeros(s.shape[1], dtype=torch.float64)) for s in sites}
    squares = _OutputSums(model)
    ids_NT = context.inputs.calibration()
    room = Room.measured(context.device, context.scratch)
    parts = ids_NT.split(_together(model, ids_NT, room))
    with bar("Fisher information, blocks there and back", 2 * model.structure.blocks * len(parts)) as shown:

        def step() -> None:
            shown.advance()
            check_stop(context)

        for part_NT in parts:
            entering = _forward(model, part_NT, room, step)
            with squares.at_logits():
                gradients = HiddenStates.of(_head_gradients(model, entering.pop(), part_NT), room)
            for index in model.walk(backward=True):
                _backward(model, index, entering.pop(), gradients, sums)
                step()
            for ids_1T, gradient_1TD in zip(part_NT.split(1), gradients, strict=True):
                squares.look_up(ids_1T, gradient_1TD)
    return sums, squares.found()


def _together(model: StreamedModel, ids_NT: Tensor, room: Room) -> int:
    """How many sequences' states, one for each block and their gradients, lie in memory together; one goes to files if it must."""
    of_one = (model.structure.blocks + 2) * ids_NT.shape[1] * model.model.config.get_text_config().hidden_size * model.dtype.itemsize
    return max(1, int(min(room.memory_bytes // of_one, len(ids_NT))))


def _forward(model: StreamedModel, ids_NT: Tensor, room: Room, step: Callable[[], None]) -> list[HiddenStates]:
    """What enters each block, and what leaves the last one, sequence by sequence."""
    states = [HiddenStates.of((model.embed(ids_1T) for ids_1T in ids_NT.split(1)), room)]
    with torch.no_grad():
        for index in model.walk():
            states.append(HiddenStates.of(map(partial(model.run_block, index), states[-1]), room))
            step()
    return states


def _head_gradients(model: StreamedModel, leaving: HiddenStates, ids_NT: Tensor) -> Iterator[Tensor]:
    """The mean loss's gradient at what leaves the last block, for each sequence; logits of a span of tokens at a time."""
    for hidden_1TD, ids_T in zip(leaving, ids_NT, strict=True):
        leaf_1TD, count = hidden_1TD.detach().requires_grad_(True), len(ids_T) - 1
        for start in range(0, count, LOGITS_AT_ONCE):
            stop = min(start + LOGITS_AT_ONCE, count)
            logits_TV = model.logits(leaf_1TD[:, start:stop])[0].float()
            loss = nn.functional.cross_entropy(logits_TV, ids_T[start + 1 : stop + 1].to(logits_TV.device), reduction="sum") / count
            loss.backward()
        assert leaf_1TD.grad is not None
        yield leaf_1TD.grad


def _backward(model: StreamedModel, index: int, entering: HiddenStates, gradients: HiddenStates, sums: Sums) -> None:
    """Add a loaded block's squared gradients, and put the gradient at what enters it in the place of that at what leaves it."""
    sites = model.structure.of_block(index)
    here: Sums = {site.name: tuple(t.to(model.device) for t in sums[site.name]) for site in sites}  # type: ignore[misc]
    by_parameter: dict[str, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(f"{site.module}.{site.parameter}", []).append(site)
    for name, members in by_parameter.items():
        parameter = model.model.get_parameter(name)
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(_consume(members, here))
    for number, (hidden_1TD, gradient_1TD) in enumerate(zip(entering, gradients, strict=True)):
        leaf_1TD = hidden_1TD.detach().requires_grad_(True)
        model.run_block(index, leaf_1TD).backward(gradient_1TD)
        assert leaf_1TD.grad is not None
        gradients.put(number, leaf_1TD.grad)
    for name, (row_O, column_I) in here.items():
        sums[name] = row_O.cpu(), column_I.cpu()


def _consume(members: list[Site], sums: Sums) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for site in members:
            squares_OI = site.read(parameter.grad).float().square()
            row_O, column_I = sums[site.name]
            row_O += squares_OI.mean(1).double()
            column_I += squares_OI.mean(0).double()
        parameter.grad = None

    return hook


class _OutputSums:
    """Adds up the squared gradients of `OutputSquares` on the model's device."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        table, head = model.structure.embeddings, model.structure.head
        self.table = None if table is None else model.model.get_submodule(table.module)
        self.head = None if head is None else model.model.get_submodule(head.module)
        self.looked_up_D = None if table is None else torch.zeros(table.shape[1], dtype=torch.float64, device=model.device)
        self.logits_V = None if head is None else torch.zeros(head.shape[0], dtype=torch.float64, device=model.device)

    def found(self) -> OutputSquares:
        return OutputSquares(*(None if t is None else t.cpu() for t in (self.looked_up_D, self.logits_V)))

    @contextmanager
    def at_logits(self) -> Iterator[None]:
        """While open, what goes back through the head counts."""

        def count(gradient: Tensor) -> None:
            assert self.logits_V is not None
            self.logits_V += torch.linalg.vector_norm(gradient.flatten(0, -2), dim=0, dtype=torch.float32).double().square()

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
        if self.table is None or self.looked_up_D is None:
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
        self.looked_up_D += (times * at_out.float()).double().square().sum((0, 1))
