"""Reconstruction after pruning: train the kept weights of one decoder block so that it does what the dense block does, layer-wise in depth
(PERP, arXiv:2312.15230, sec. 3.3), attention and MLP together or one after the other (arXiv:2510.14444).

Knows a block as a function (`compress.block.BlockProblem`); its memory is one block, whatever the depth.
Legend: O out, I in, R rank, N windows, T tokens, D model width.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..compress.block import BlockProblem
from ..compress.weights import DenseWeight, StoredWeight
from .adapters import start_factors
from .selection import roles

ATTENTION_ROLES = frozenset({"q", "k", "v", "o"})


@dataclass(frozen=True)
class Reconstruct:
    """trains: the kept weights themselves, or a MaskLoRA pair of `rank`. window "halves" first fits attention with the MLP as it was
    before compression, then the MLP behind the fitted attention; "block" fits all at once. Rates are for Adam; weights are trained in units
    of their matrix' root mean square."""

    trains: Literal["weights", "mask_lora"] = "mask_lora"
    rank: int = 16
    window: Literal["block", "halves"] = "halves"
    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Fit:
    """One matrix on its way: parameters, and the effective weight as a function of them."""

    parameters: list[Tensor]
    weight: Callable[[], Tensor]


def reconstruct(problem: BlockProblem, configs: Mapping[str, Reconstruct]) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """(records, metrics per matrix): masks as they were, output error never above where it began (the best iterate is kept).
    `configs` names the matrices to train, all with one config. ValueError on a quantized base."""
    config = next(iter(configs.values()))
    for name in configs:
        if not isinstance(problem.weights[name].base, DenseWeight):
            raise ValueError(f"{name}: reconstruction trains dense weights under their mask; for a grid use block_training")
    effective = {name: record.dense() for name, record in problem.weights.items()}
    started = block_error(problem, effective)
    for group in _windows(list(configs), config.window):
        rest = dict(effective)
        if config.window == "halves" and any(_is_attention(n) for n in group):
            rest |= {n: problem.targets[n] for n in configs if not _is_attention(n)}
        effective |= _fit(problem, {n: problem.weights[n] for n in group}, {k: v for k, v in rest.items() if k not in group}, config)
    ended = block_error(problem, effective)
    better = ended < started
    records = {
        name: _record(problem.weights[name], effective[name]) if better and name in configs else problem.weights[name]
        for name in problem.weights
    }
    metrics = {"block_error_before": started, "block_error_after": min(started, ended)}
    return records, {name: dict(metrics) for name in configs}


def _windows(names: list[str], window: str) -> list[list[str]]:
    if window == "block":
        return [names]
    attention = [n for n in names if _is_attention(n)]
    return [group for group in (attention, [n for n in names if n not in attention]) if group]


def _is_attention(name: str) -> bool:
    return bool(ATTENTION_ROLES & set(roles(name)))


@torch.no_grad()
def block_error(problem: BlockProblem, effective: Mapping[str, Tensor], size: int = 4) -> float:
    """Relative squared output error of the block over all windows."""
    wrong, total = 0.0, 0.0
    for x, y in zip(problem.inputs_NTD.split(size), problem.outputs_NTD.split(size), strict=True):
        wrong += float((problem.forward(dict(effective), x) - y).square().sum())
        total += float(y.square().sum())
    return wrong / max(total, 1e-30)


def _fit(problem: BlockProblem, records: Mapping[str, StoredWeight], rest: Mapping[str, Tensor], config: Reconstruct) -> dict[str, Tensor]:
    """Train the matrices of one window with all others fixed; the best of start and five checkpoints."""
    fits = {name: _start(name, record, config, problem.seed) for name, record in records.items()}
    parameters = [p for fit in fits.values() for p in fit.parameters]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.95))
    best = {name: record.dense() for name, record in records.items()}
    best_error = block_error(problem, {**rest, **best})
    scale = problem.outputs_NTD.square().mean().clamp(min=1e-30)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 5) * (1 - step / config.steps)
        generator = torch.Generator().manual_seed(problem.seed * 1_000_003 + step)
        chosen = torch.randint(len(problem.inputs_NTD), (min(config.batch_size, len(problem.inputs_NTD)),), generator=generator)
        output = problem.forward({**rest, **{name: fit.weight() for name, fit in fits.items()}}, problem.inputs_NTD[chosen])
        loss = (output - problem.outputs_NTD[chosen]).square().mean() / scale
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if (step + 1) % max(1, config.steps // 5) == 0 or step + 1 == config.steps:
            now = {name: fit.weight().detach() for name, fit in fits.items()}
            error = block_error(problem, {**rest, **now})
            if error < best_error:
                best, best_error = now, error
    return best


def _start(name: str, record: StoredWeight, config: Reconstruct, seed: int) -> Fit:
    start, mask = record.dense(), record.mask_OI()
    kept = torch.ones_like(start, dtype=torch.bool) if mask is None else mask
    unit = start[kept].square().mean().sqrt().clamp(min=1e-12)
    if config.trains == "weights":
        moved = torch.zeros_like(start).requires_grad_(True)
        return Fit([moved], lambda: start + (unit * moved).where(kept, 0))
    generator = torch.Generator().manual_seed(seed * 65_537 + zlib.crc32(name.encode()))
    up, down = (f.to(start.device).requires_grad_(True) for f in start_factors(record.shape, min(config.rank, *record.shape), generator))
    gain = unit * start.shape[1] ** 0.5
    return Fit([up, down], lambda: start + (gain * (up @ down)).where(kept, 0))


def _record(record: StoredWeight, effective_OI: Tensor) -> StoredWeight:
    """The record whose effective weight is `effective`: what is beside the base stays, the base takes the rest."""
    assert isinstance(record.base, DenseWeight)
    beside = replace(record, base=DenseWeight(torch.zeros_like(effective_OI)), mask=None, smooth=None).dense()
    base = effective_OI - beside
    if record.smooth is not None:
        base = base * record.smooth.float()
    mask = record.mask_OI()
    return replace(record, base=DenseWeight((base if mask is None else base.where(mask, 0)).to(record.base.weight.dtype)))
