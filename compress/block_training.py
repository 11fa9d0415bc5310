"""Quantization trained block by block: rounding and grid of all matrices of one decoder block, so that the block as a whole does what
the dense block does.

`learned_rounding` moves rounding offsets and range multipliers by signed gradient descent (AutoRound, arXiv:2309.05516);
`block_training` moves the weights themselves, scales and zeros by Adam through a straight-through estimator (EfficientQAT's first
phase, arXiv:2407.11062). Both begin at GPTQ's codes or at the nearest ones, keep the best iterate by the loss over all samples,
the start among them, and end in an ordinary grid weight. Knows a block as a function (`BlockProblem`); no models, no files.
Legend: O out, I in, G groups, N windows, T tokens, D model width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .block import BlockProblem
from .gptq import GptqConfig, gptq
from .grids import Clip, UniformGrid, check_grid
from .rounding import RtnConfig, base_target, quantized, rtn
from .weights import ActivationGrid, DenseWeight, StoredWeight, UniformWeight

Start = Literal["gptq", "rtn", "stored"]
HALF = 0.499


@dataclass(frozen=True)
class LearnedRoundingConfig:
    """`start` "stored" goes on from the codes of a quantize stage before it. `steps` updates of `batch_size` windows each, at most
    `window` tokens long; rates fall linearly to 0. `outliers` is the share of largest squared errors that the loss does not see
    (SignRoundV2). `target`: what the dense block makes of the dense model's states, or of the compressed model's."""

    bits: int = 3
    group_size: int = 64
    symmetric: bool = False
    clip: Clip = "power"
    start: Start = "gptq"
    steps: int = 100
    batch_size: int = 4
    window: int = 512
    learning_rate: float | None = None
    range_rate: float | None = None
    outliers: float = 0.001
    target: Literal["dense", "compressed"] = "dense"
    activations: ActivationGrid | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class BlockTrainingConfig:
    """Rates are in units of the grid step for weights and zeros, relative for scales."""

    bits: int = 3
    group_size: int = 64
    symmetric: bool = False
    clip: Clip = "power"
    start: Start = "gptq"
    steps: int = 100
    batch_size: int = 4
    window: int = 512
    learning_rate: float = 2e-2
    scale_rate: float = 4e-3
    zero_rate: float = 0.0
    outliers: float = 0.0
    target: Literal["dense", "compressed"] = "dense"
    activations: ActivationGrid | None = None

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Any) -> None:
    check_grid(config.bits, config.group_size, config.clip)
    if config.start not in ("gptq", "rtn", "stored"):
        raise ValueError(f"start {config.start!r} is unknown; choose gptq, rtn or stored")
    for name in ("steps", "batch_size", "window"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be at least 1")
    if not 0 <= config.outliers < 1:
        raise ValueError(f"outliers {config.outliers} must lie in [0, 1)")


def block_needs(config: Any) -> frozenset[str]:
    """GPTQ's start wants second moments."""
    return frozenset({"second_moment"}) if config.start == "gptq" else frozenset()


@dataclass
class Latent:
    """One matrix on its way: u [O, I] in grid steps around the zero point (codes = round(u + offset) + zero), and how its scales move.

    u holds GPTQ's decisions: where the code is not the nearest one, u lies at the edge of that code's cell. `beside` is what the
    record adds to its base (low-rank term, delta).
    """

    start: StoredWeight
    base: UniformWeight
    u_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    keep_OI: Tensor | None
    beside_OI: Tensor
    offset_OI: Tensor
    range_OG: Tensor
    shift_OG: Tensor

    @classmethod
    def of(cls, record: StoredWeight, target_OI: Tensor) -> "Latent":
        base = record.base
        assert isinstance(base, UniformWeight)
        scale, zero = base.scales.float(), base.zeros_OG()
        codes = base.codes_OI().float() - _spread(zero, base)
        u = codes + (base_target(record, target_OI) / _spread(scale, base) - codes).clamp(-HALF, HALF)
        beside = replace(record, base=DenseWeight(torch.zeros_like(u)), mask=None).dense()
        zeros = torch.zeros_like
        return cls(record, base, u, scale, zero, record.mask_OI(), beside, zeros(u), zeros(scale), zeros(scale))

    def parameters(self) -> list[Tensor]:
        return [self.offset_OI, self.range_OG, self.shift_OG]

    def effective(self) -> Tensor:
        """The [O, I] matrix, differentiable: rounding and the zero's rounding are passed straight through."""
        top = (1 << self.base.bits) - 1
        zero = _round(self.zero_OG + self.shift_OG).clamp(1, top)
        columns = _spread(zero, self.base)
        steps = (_round(self.u_OI + self.offset_OI) + columns).clamp(0, top) - columns
        weight = steps * _spread(self.scale_OG * (1 + self.range_OG), self.base)
        if self.keep_OI is not None:
            weight = weight * self.keep_OI
        if self.start.smooth is not None:
            weight = weight / self.start.smooth.float()
        return weight + self.beside_OI

    @torch.no_grad()
    def record(self) -> StoredWeight:
        """The grid weight as it will be stored, scales rounded to their type."""
        top = (1 << self.base.bits) - 1
        zero = (self.zero_OG + self.shift_OG).round().clamp(1, top)
        columns = _spread(zero, self.base)
        codes = ((self.u_OI + self.offset_OI).round() + columns).clamp(0, top)
        if self.keep_OI is not None:
            codes = codes.where(self.keep_OI, columns)
        scale = (self.scale_OG * (1 + self.range_OG)).to(self.base.scales.dtype)
        zeros = None if self.base.zeros is None else zero.to(torch.int64)
        return replace(self.start, base=UniformWeight.from_codes(codes.to(torch.int64), scale, zeros, self.base.bits, self.base.group_size))


def _spread(groups_OG: Tensor, base: UniformWeight) -> Tensor:
    """[O, G] → [O, I]."""
    return groups_OG.repeat_interleave(base.in_features // base.groups, dim=1)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def learned_rounding(
    problem: BlockProblem, configs: Mapping[str, LearnedRoundingConfig]
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """Offsets within ±½ of a step and ranges within ±½ of themselves, by the sign of their gradients (eq. 3 and 4)."""
    config = next(iter(configs.values()))
    latents, metrics = _begin(problem, configs)
    rate = config.learning_rate or 1.0 / config.steps
    # a whole scale is far more to lose than one rounding: its steps are a tenth, or what `range_rate` says
    ranges = config.range_rate if config.range_rate is not None else rate / 10

    def step(progress: float) -> None:
        for latent in latents.values():
            for parameter, size in ((latent.offset_OI, rate), (latent.range_OG, ranges)):
                assert parameter.grad is not None
                parameter.data.sub_(parameter.grad.sign(), alpha=size * (1 - progress)).clamp_(-0.5, 0.5)

    for latent in latents.values():
        latent.offset_OI.requires_grad_(True)
        latent.range_OG.requires_grad_(True)
    return _train(problem, latents, config, step, metrics)


def block_training(
    problem: BlockProblem, configs: Mapping[str, BlockTrainingConfig]
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """Weights, scales and (with zero_rate) zeros of the block by Adam."""
    config = next(iter(configs.values()))
    latents, metrics = _begin(problem, configs)
    groups: list[dict[str, Any]] = []
    for latent in latents.values():
        movable = [(latent.offset_OI, config.learning_rate), (latent.range_OG, config.scale_rate)]
        if config.zero_rate and not config.symmetric:
            movable.append((latent.shift_OG, config.zero_rate))
        for parameter, rate in movable:
            if rate:
                groups.append({"params": [parameter.requires_grad_(True)], "lr": rate, "full": rate})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def step(progress: float) -> None:
        warmup = min(1.0, (progress * config.steps + 1) / 5)
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * warmup * (1 - progress)
        optimizer.step()

    return _train(problem, latents, config, step, metrics)


def _begin(problem: BlockProblem, configs: Mapping[str, Any]) -> tuple[dict[str, Latent], dict[str, dict[str, float]]]:
    """Every matrix on its grid, before training."""
    latents, metrics = {}, {}
    for name, config in configs.items():
        record, target, statistics = problem.weights[name], problem.targets[name], problem.statistics[name]
        metrics[name] = {}
        if config.start == "stored":
            if not isinstance(record.base, UniformWeight) or record.base.group_index is not None:
                raise ValueError(
                    f"{name}: start=stored needs a uniform grid with contiguous groups from a quantize stage before; use start=gptq"
                )
            record = quantized(record, record.base, config.activations or record.activations)
        elif config.start == "gptq":
            plain = GptqConfig(config.bits, config.group_size, config.symmetric, config.clip, activations=config.activations)
            record, metrics[name] = gptq(record, target, statistics, plain)
        else:
            plain = RtnConfig(config.bits, config.group_size, config.symmetric, config.clip, activations=config.activations)
            record, metrics[name] = rtn(record, target, statistics, plain)
        UniformGrid(config.bits, config.group_size).size(record.shape[1])
        latents[name] = Latent.of(record, target)
    return latents, metrics


def _train(
    problem: BlockProblem, latents: dict[str, Latent], config: Any, step: Callable[[float], None], metrics: dict[str, dict[str, float]]
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """Updates on random windows; the best of the evaluated iterates, as stored, is returned."""
    inputs, outputs = _windows(problem, config)
    generator = torch.Generator().manual_seed(problem.seed)
    best = {name: latent.record() for name, latent in latents.items()}
    start = lowest = _loss_over_all(problem, best, inputs, outputs, config)
    best_step, every = 0, max(1, config.steps // 5)
    for index in range(config.steps):
        rows = torch.randint(len(inputs), (config.batch_size,), generator=generator)
        for latent in latents.values():
            for parameter in latent.parameters():
                parameter.grad = None
        with torch.enable_grad():
            out = problem.forward({name: latent.effective() for name, latent in latents.items()}, inputs[rows])
            _loss(out, outputs[rows], config.outliers).backward()
        step(index / config.steps)
        if (index + 1) % every == 0 or index + 1 == config.steps:
            records = {name: latent.record() for name, latent in latents.items()}
            loss = _loss_over_all(problem, records, inputs, outputs, config)
            if loss < lowest:
                best, lowest, best_step = records, loss, index + 1
    share = {"block_loss_start": start, "block_loss_best": lowest, "best_step": float(best_step)}
    return best, {name: found | share for name, found in metrics.items()}


def _windows(problem: BlockProblem, config: Any) -> tuple[Tensor, Tensor]:
    """Inputs and wanted outputs [N, T, D], cut to `window` tokens."""
    inputs, outputs = problem.inputs_NTD, problem.outputs_NTD
    if config.target == "compressed":
        with torch.no_grad():
            outputs = torch.cat([problem.forward(problem.targets, x) for x in inputs.split(config.batch_size)])
    length = inputs.shape[1]
    if length <= config.window:
        return inputs, outputs
    # windows of a causal block must keep their positions: only the first `window` tokens of each sample are exact
    return inputs[:, : config.window], outputs[:, : config.window]


def _loss(out_BTD: Tensor, wanted_BTD: Tensor, outliers: float) -> Tensor:
    """Mean squared error, without the `outliers` largest share."""
    errors = (out_BTD.float() - wanted_BTD.float()).square().view(-1)
    dropped = int(outliers * errors.numel())
    if not dropped:
        return errors.mean()
    limit = errors.detach().kthvalue(errors.numel() - dropped).values
    return (errors * (errors <= limit)).sum() / (errors.numel() - dropped)


@torch.no_grad()
def _loss_over_all(problem: BlockProblem, records: Mapping[str, StoredWeight], inputs: Tensor, outputs: Tensor, config: Any) -> float:
    matrices = {name: record.dense() for name, record in records.items()}
    total = 0.0
    for x, wanted in zip(inputs.split(config.batch_size), outputs.split(config.batch_size), strict=True):
        total += float(_loss(problem.forward(matrices, x), wanted, config.outliers)) * len(x)
    return total / len(inputs)
