"""Reconstruction: train one decoder block so that it does what the dense block does to the same inputs, layer by layer in depth
(PERP, arXiv:2312.15230, sec. 3.3), attention and MLP together or one after the other (arXiv:2510.14444).

What trains is what another method attaches, bounded as there: kept weights, pairs under the mask, norms, biases, scales, factors. A step's windows
lie in slots, whose gradients are summed in their order, whichever process has them.
Knows a block as a function of hidden states; its memory is one block, whatever the depth. Not files, nor where hidden states come from.
Legend: B batch, T tokens, D model width.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor, nn

from ..compress.ranges import Batch, Count, FactorOrZero, Layers, Rate, ReadWhere, Steps, StepsOrZero, Targets, Tokens, Width
from . import attach as methods
from .adamw import AdamW
from .compressed_linear import CompressedLinear
from .compressed_model import compressed_linears, steady
from .peers import ALONE, Peers, SharedGradients
from .selection import norms, roles, where
from .site import AttachSite, joined, kinds, train_norms
from .stored_values import as_stored, beyond_limits, extremes
from .train import ROLLBACK_FACTOR
from .trainable import Attached
from .training_run import learning_rate, rates

ATTENTION_ROLES = frozenset({"q", "k", "v", "o"})
WEIGHT_RATE = 2e-3
"""Default learning rate of whole weights, in units of their matrix' root mean square."""


@dataclass(frozen=True)
class Reconstruct:
    """`train`: mask_lora (a pair of `rank` under the mask), weights (the kept ones), norms, biases, scales, lora; auto is scales on a grid
    and mask_lora elsewhere; `norms`: those as well. window "block" fits a block at once; "split" first attention with the MLP as it was before compression, then the MLP behind the
    fitted attention. `steps` are for each window of each block; `samples` windows of `seq_len` tokens of training text."""

    train: Literal["auto", "mask_lora", "weights", "norms", "biases", "scales", "lora"] = "auto"
    norms: Annotated[bool, ReadWhere("train is not norms", lambda config: config.train != "norms")] = True
    rank: Annotated[Width, ReadWhere("train is auto, mask_lora or lora", lambda config: config.train in ("auto", "mask_lora", "lora"))] = 16
    window: Literal["block", "split"] = "block"
    steps: Steps = 100
    learning_rate: Rate | None = None
    batch_size: Batch = 4
    seq_len: Tokens = 256
    samples: Count = 64
    warmup: StepsOrZero = 10
    clip: FactorOrZero = 1.0
    targets: Targets = "all"
    layers: Layers = "all"


TRAINS: dict[str, tuple[str, Callable[[Reconstruct], object], str]] = {
    "mask_lora": ("perp", lambda c: methods.Perp(norms=False, biases=False, lora="mask_lora", rank=c.rank), "factors"),
    "weights": ("full", lambda c: methods.Full(norms=False, biases=False), "dense"),
    "norms": ("perp", lambda c: methods.Perp(norms=True, biases=False), "norms"),
    "biases": ("bitfit", lambda c: methods.BitFit(), "biases"),
    "scales": ("scales", lambda c: methods.Scales(norms=False), "scales"),
    "lora": ("lora", lambda c: methods.Lora(rank=c.rank), "factors"),
}
"""train → the method that attaches it, its config, and the kind of parameter that `learning_rate` means."""


def resolved(config: Reconstruct, kinds: frozenset[str]) -> Reconstruct:
    """`auto` decided by what the linears are made of (`site.kinds`)."""
    return replace(config, train="mask_lora" if "dense" in kinds else "scales") if config.train == "auto" else config


def attach_part(site: AttachSite, config: Reconstruct) -> Attached:
    """What `train` names, on the site's linears; norms too where they are asked for."""
    config = resolved(config, frozenset().union(*(kinds(linear.stored) for linear in site.linears.values())))
    name, own, _ = TRAINS[config.train]
    parts = [getattr(methods, name)(site, own(config))]
    return joined(*parts, *([train_norms(site)] if config.norms and config.train != "norms" else []))


class Pairs(Protocol):
    """(input, wanted output) by number, those of this process alone, which need not all lie in memory: a dict is one."""

    def __getitem__(self, number: int, /) -> tuple[Tensor, Tensor]: ...

    def items(self) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]: ...


@dataclass
class Block:
    """One block under training. `forward` runs it as it stands in the model; `pairs` are (input, what the dense block makes of it), all
    [B, T, D], to train on; `batches` names those of every batch, slot by slot; `checks` are others, on which the best is chosen; `dense`: the dense
    block's linears by name; `chosen`: names of the linears that may train; `attach(targets)` puts the method on the linears of those names. Among
    `peers` a pair at place k of a batch, and a check of number k, are of process k % size."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    pairs: Pairs
    batches: Sequence[Sequence[int]]
    checks: Pairs
    dense: Mapping[str, nn.Module]
    chosen: frozenset[str]
    attach: Callable[[tuple[str, ...]], Attached]
    seed: int
    stop: Callable[[], bool] = field(default=lambda: False)
    peers: Peers = ALONE


@dataclass(frozen=True)
class Fitted:
    """Relative squared errors of the block's output over its checks; `plain` as in Attached; `count` trained numbers; `diverged`: what went wrong."""

    error_before: float
    error_after: float
    plain: dict[str, torch.dtype]
    count: int
    diverged: tuple[str, ...] = ()

    @property
    def improved(self) -> bool:
        return self.error_after < self.error_before


def reconstruct(block: Block, config: Reconstruct) -> Fitted:
    """Fit the block; where its error did not fall, everything is as it was. KeyboardInterrupt when asked to stop, ReplicasDiffer when peers no
    longer hold the same values."""
    linears = compressed_linears(block.model)
    config = resolved(config, frozenset().union(*(kinds(linears[name].stored) for name in block.chosen)))
    before = block_error(block)
    done: list[Attached] = []
    starts: list[dict[str, Tensor]] = []
    problems: list[str] = []
    for group, others in _windows(block, linears, config.window):
        wanted = [name for name in group if name in block.chosen]
        if not wanted:
            continue
        attached = block.attach(tuple(f"{re.escape(name)}$" for name in wanted))
        attached = _without_norms_of(attached, block, set(others))
        if not attached.trainables:
            continue
        done.append(attached)
        starts.append(_snapshot(attached))
        standing = {n: block.dense[n] for n in others} if config.window == "split" and _is_attention(group[0]) else {}
        with instead(block.model, standing):
            problems += _fit(block, attached, config)
    block.peers.check({f"{at}.{name}": value for at, attached in enumerate(done) for name, value in _snapshot(attached).items()})
    with _all_stored(done):
        after = block_error(block)
    if not after < before:
        for attached, start in zip(done, starts, strict=True):
            _restore(attached, start)
    plain = {name: dtype for attached in done for name, dtype in attached.plain.items()}
    return Fitted(before, min(before, after), plain, sum(a.count() for a in done), tuple(problems))


def _windows(block: Block, linears: Mapping[str, CompressedLinear], window: str) -> list[tuple[list[str], list[str]]]:
    """(linears of a window, all others) in the order in which they are fitted."""
    names = list(linears)
    attention = [n for n in names if _is_attention(n)]
    rest = [n for n in names if n not in attention]
    if window == "block" or not attention or not rest:
        return [(names, [])]
    return [(attention, rest), (rest, attention)]


def _is_attention(name: str) -> bool:
    return bool(ATTENTION_ROLES & set(roles(name)))


def _without_norms_of(attached: Attached, block: Block, others: set[str]) -> Attached:
    """A norm belongs to the window of the linear that runs next; the norms of the other window are no part of this one."""
    if not others or not attached.plain:
        return attached
    owner = _next_linear(block)
    foreign = {name for name in attached.plain if owner.get(name.rpartition(".")[0]) in others}
    for name in foreign:
        attached.trainables.pop(name).parameter.requires_grad_(False)
    return replace(attached, plain={n: d for n, d in attached.plain.items() if n not in foreign})


@torch.no_grad()
def _next_linear(block: Block) -> dict[str, str]:
    """Norm → the linear that is called after it in the block."""
    order: list[str] = []
    watched = {**compressed_linears(block.model), **{n: block.model.get_submodule(n) for n in norms_loaded(block.model)}}
    handles = [module.register_forward_pre_hook(lambda m, args, n=name: order.append(n)) for name, module in watched.items()]
    try:
        for _, (x, _) in block.pairs.items():
            block.forward(x)
            break
    finally:
        for handle in handles:
            handle.remove()
    linears, order = set(compressed_linears(block.model)), block.peers.gathered(order)[0]  # the first process has a pair
    return {name: next((n for n in order[i:] if n in linears), "") for i, name in enumerate(order) if name not in linears}


def norms_loaded(model: nn.Module) -> list[str]:
    """Names of the norms that have real values."""
    return [n for n in norms(model, where(model)) if not any(p.is_meta for p in model.get_submodule(n).parameters())]


@contextmanager
def instead(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, these modules stand in the model in place of those of the same names."""
    kept = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)


@torch.no_grad()
def block_error(block: Block) -> float:
    """Mean over the tokens of everybody's checks of the output's relative squared error."""
    errors = {number: (float(token_errors(block.forward(x), y).double().sum()), y.shape[0] * y.shape[1]) for number, (x, y) in block.checks.items()}
    total, count = 0.0, 0
    for error, tokens in block.peers.in_order(errors):
        total, count = total + error, count + tokens
    return total / max(1, count)


def token_errors(found_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """‖actual − wanted‖² / ‖wanted‖² of every token, [B, T]: what is above normalises its input, so the few tokens of huge norm that models
    keep must not decide for all others."""
    wanted_BTD = wanted_BTD.float()
    return (found_BTD.float() - wanted_BTD).square().sum(-1) / wanted_BTD.square().sum(-1).clamp(min=1e-30)


def _fit(block: Block, attached: Attached, config: Reconstruct) -> list[str]:
    """Train one window, all others fixed; the trainables end with the best of start and five checkpoints. A loss or a value that turns
    non-finite: once back to the best with a smaller rate, the second time the window ends there. Returns what went wrong."""
    optimizer, full, factor, problems = AdamW(attached.trainables, betas=(0.9, 0.95)), _rates(attached, config), 1.0, []
    best, best_error = _snapshot(attached), _stored_error(block, attached)
    every = max(1, config.steps // 5)
    for step in range(config.steps):
        if block.stop():
            raise KeyboardInterrupt
        share = learning_rate(step, config) * factor
        problem = _step(block, attached, optimizer, {name: rate * share for name, rate in full.items()}, config, step)
        error = math.inf
        if problem is None and ((step + 1) % every == 0 or step + 1 == config.steps):
            error = _stored_error(block, attached)
            problem = None if math.isfinite(error) else f"step {step + 1}: the block's error is not finite"
        if problem is not None:
            _restore(attached, best)
            optimizer.reset()
            problems.append(problem)
            factor *= ROLLBACK_FACTOR
            if len(problems) == 2:
                break
        elif error < best_error:
            best, best_error = _snapshot(attached), error
    _restore(attached, best)
    return problems


def _step(block: Block, attached: Attached, optimizer: AdamW, now: Mapping[str, float], config: Reconstruct, step: int) -> str | None:
    """One update on one batch, which depends on (seed, step) alone; what went wrong, or None. Of the batch's slots each process takes its own."""
    generator, peers = torch.Generator().manual_seed(block.seed * 1_000_003 + step), block.peers
    slots = block.batches[int(torch.randint(len(block.batches), (1,), generator=generator))]
    parameters = [t.parameter for t in attached.trainables.values()]
    for parameter in parameters:
        parameter.grad = None
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    shared = None if peers.size == 1 else SharedGradients(peers, parameters, parameters[0].device)
    with steady(compressed_linears(block.model).values()):
        for slot in peers.rounds(len(slots)):
            loss = None
            if slot is not None:
                x, y = block.pairs[slots[slot]]
                loss = token_errors(block.forward(x), y).mean() * (len(x) / config.batch_size)
                torch.autograd.backward(loss)
                total += loss.detach()
            if shared is not None:
                shared.add(None if loss is None else loss.detach())
    if shared is not None:
        total, _ = shared.settle(0)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip if config.clip > 0 else math.inf)
    optimizer.step(now, step / config.steps)
    error, size, *reached = torch.cat([total.view(1), norm.view(1), *extremes(attached.trainables)]).tolist()
    if not (math.isfinite(error) and math.isfinite(size)):
        return f"step {step + 1}: the loss is not finite"
    return beyond_limits(attached.trainables, reached)


def _stored_error(block: Block, attached: Attached) -> float:
    with as_stored(attached):
        return block_error(block)


def _snapshot(attached: Attached) -> dict[str, Tensor]:
    return {name: t.parameter.detach().clone() for name, t in attached.trainables.items()}


def _rates(attached: Attached, config: Reconstruct) -> dict[str, float]:
    """Full learning rate by name; whole weights in units of their matrix' root mean square."""
    out = rates(attached.trainables, config, TRAINS[config.train][2])
    for name, t in attached.trainables.items():
        if t.kind == "dense":
            kept = t.parameter.detach()
            rms = float((kept.square().sum() / kept.count_nonzero().clamp(min=1)).sqrt())
            out[name] = (config.learning_rate or WEIGHT_RATE) * rms
    return out


@torch.no_grad()
def _restore(attached: Attached, values: Mapping[str, Tensor]) -> None:
    for name, t in attached.trainables.items():
        t.parameter.copy_(values[name])
        t.parameter.grad = None


@contextmanager
def _all_stored(attached: Sequence[Attached]) -> Iterator[None]:
    if not attached:
        yield
        return
    with as_stored(attached[0]), _all_stored(attached[1:]):
        yield
