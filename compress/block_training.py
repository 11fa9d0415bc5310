"""Quantization trained block by block: rounding and grid of all matrices of one decoder block, so that the block does what the dense
block does.

`learned_rounding` moves rounding offsets and range multipliers by signed gradient descent (AutoRound, arXiv:2309.05516);
`block_training` moves the weights themselves, scales and zeros by Adam through a straight-through estimator (EfficientQAT's first
phase, arXiv:2407.11062). Both begin at GPTQ's codes or at the nearest ones, keep the best iterate by the loss over all samples,
the start among them, and end in an ordinary grid weight. A step's windows come from the slots in turn; their gradients are summed in the order of
the slots, whoever has them: the same bits on any number of processes. Knows a block as a function (`BlockProblem`); no models, no files.
Legend: O out, I in, G groups, N windows, T tokens, D model width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from .block import BlockProblem, Window
from .ggml_grids import check_type
from .ggml_types import GridName
from .gptq import GptqConfig, gptq
from .grids import Clip, check_zeros, clip_needs
from .latents import Latent
from .precision import Matmul, matmuls
from .ranges import Batch, Bits, Group, Rate, RateOrZero, ReadWhere, Share, Steps, Tokens
from .rounding import RtnConfig, quantized, rtn
from .statistics import LayerStatistics
from .weights import ActivationGrid, Base, GgmlWeight, StoredWeight, UniformWeight

Start = Literal["gptq", "rtn", "stored"]
Records = dict[str, StoredWeight]
Metrics = dict[str, dict[str, float]]
Step = Callable[[float], None]
EVALUATIONS = 5
"""Evaluations on all samples per training, the one at its start not counted."""


_NEW = ReadWhere("start is gptq or rtn", lambda config: config.start != "stored")


_MOVING = ReadWhere("symmetric is false and grid is uniform", lambda config: not config.symmetric and config.grid == "uniform")


@dataclass(frozen=True)
class LearnedRoundingConfig:
    """AutoRound (arXiv:2309.05516) with one range multiplier a group, where it has two: α for the largest and β for the smallest weight.

    `start` "stored" goes on from the codes of a quantize stage before it. `steps` updates of `batch_size` samples each, the first
    `seq_len` tokens of them; rates fall linearly to 0. `window`: what trains together and where the error is measured: the matrices of
    attention and of the MLP one after the other, those of the block, or those of the block seen from behind the next block. `outliers` is
    the share of largest squared errors, within one micro-batch, that the loss leaves out (SignRoundV2). `target`: what the dense block makes of the dense
    model's states, or of the compressed model's."""

    bits: Annotated[Bits, _NEW] = 3
    group_size: Annotated[Group, _NEW] = 64
    symmetric: bool = False
    clip: Annotated[Clip, _NEW] = "hessian"
    float_zeros: Annotated[bool, _NEW] = False
    start: Start = "gptq"
    window: Window = "block"
    steps: Steps = 100
    batch_size: Batch = 4
    seq_len: Tokens = 512
    learning_rate: Rate | None = None
    range_rate: RateOrZero | None = None
    outliers: Share = 0.001
    target: Literal["dense", "compressed"] = "dense"
    matmul: Matmul = "highest"
    activations: ActivationGrid | None = None
    grid: Annotated[GridName, _NEW] = "uniform"

    def __post_init__(self) -> None:
        check_zeros(self.symmetric, self.float_zeros)
        check_type(self)


@dataclass(frozen=True)
class BlockTrainingConfig:
    """As `LearnedRoundingConfig`; rates are in units of the grid step for weights and zeros, relative for scales."""

    bits: Annotated[Bits, _NEW] = 3
    group_size: Annotated[Group, _NEW] = 64
    symmetric: bool = False
    clip: Annotated[Clip, _NEW] = "hessian"
    float_zeros: Annotated[bool, _NEW] = False
    start: Start = "gptq"
    window: Window = "block"
    steps: Steps = 100
    batch_size: Batch = 4
    seq_len: Tokens = 512
    learning_rate: RateOrZero = 2e-2
    scale_rate: RateOrZero = 4e-3
    zero_rate: Annotated[RateOrZero, _MOVING] = 0.0
    outliers: Share = 0.0
    target: Literal["dense", "compressed"] = "dense"
    matmul: Matmul = "highest"
    activations: ActivationGrid | None = None
    grid: Annotated[GridName, _NEW] = "uniform"

    def __post_init__(self) -> None:
        check_zeros(self.symmetric, self.float_zeros)
        check_type(self)


TrainedConfig: TypeAlias = LearnedRoundingConfig | BlockTrainingConfig


def block_needs(config: TrainedConfig) -> frozenset[str]:
    """GPTQ's start wants second moments, rounding to nearest what its grid search weighs by."""
    if config.start == "gptq":
        return frozenset({"second_moment"})
    return clip_needs(config.clip) if config.start == "rtn" else frozenset()


def learned_rounding(problem: BlockProblem, configs: Mapping[str, LearnedRoundingConfig]) -> tuple[Records, Metrics]:
    """Offsets within ±½ of a step and ranges within ±½ of themselves, by the sign of their gradients (eq. 3 and 4)."""
    config = next(iter(configs.values()))
    rate = config.learning_rate or 1.0 / config.steps
    # a whole scale is far more to lose than one rounding: its steps are a tenth, or what `range_rate` says
    ranges = config.range_rate if config.range_rate is not None else rate / 10

    def signed(latents: Sequence[Latent]) -> Step:
        moved = [pair for latent in latents for pair in ((latent.offset_OI, rate), (latent.range_OG, ranges))]

        def step(progress: float) -> None:
            for parameter, size in moved:
                assert parameter.grad is not None
                parameter.data.sub_(parameter.grad.sign_(), alpha=size * (1 - progress)).clamp_(-0.5, 0.5)

        for parameter, _ in moved:
            parameter.requires_grad_(True)
        return step

    return _trained(problem, configs, signed)


def block_training(problem: BlockProblem, configs: Mapping[str, BlockTrainingConfig]) -> tuple[Records, Metrics]:
    """Weights, scales and (with zero_rate) zeros of the block by Adam."""
    config = next(iter(configs.values()))

    def adam(latents: Sequence[Latent]) -> Step:
        groups: list[dict[str, object]] = []
        for latent in latents:
            movable = [(latent.offset_OI, config.learning_rate), (latent.range_OG, config.scale_rate)]
            if config.zero_rate and not config.symmetric:
                movable.append((latent.shift_OG, config.zero_rate))
            groups += [{"params": [p.requires_grad_(True)], "lr": rate, "full": rate} for p, rate in movable if rate]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

        def step(progress: float) -> None:
            warmup = min(1.0, (progress * config.steps + 1) / 5)
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * warmup * (1 - progress)
            optimizer.step()

        return step

    return _trained(problem, configs, adam)


def _trains(base: Base) -> bool:
    """Whether every weight has a place between the codes of a group that lies in one piece."""
    if isinstance(base, GgmlWeight):
        return bool((base.scales_OG() != 0).all())
    return isinstance(base, UniformWeight) and base.group_index is None


def _begin(problem: BlockProblem, configs: Mapping[str, TrainedConfig]) -> tuple[dict[str, Latent], Metrics]:
    """Every matrix on its grid, before training: each is solved by its owner."""
    names, share = list(configs), problem.share

    def solve(unit: int) -> tuple[StoredWeight, dict[str, float]]:
        name = names[unit]
        record, metrics = _on_grid(name, problem.weights[name], problem.targets[name], problem.statistics[name], configs[name])
        return record if share.size == 1 else record.to("cpu"), metrics

    shapes = [problem.targets[name].shape for name in names]
    solved = dict(zip(names, share.solved([float(rows + columns) * columns**2 for rows, columns in shapes], solve), strict=True))
    latents = {name: Latent.of(record.to(problem.targets[name].device), problem.targets[name]) for name, (record, _) in solved.items()}
    return latents, {name: metrics for name, (_, metrics) in solved.items()}


def _on_grid(
    name: str, record: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: TrainedConfig
) -> tuple[StoredWeight, dict[str, float]]:
    """What the config starts from."""
    grid = (config.bits, config.group_size, config.symmetric, config.clip, config.float_zeros)
    if config.start == "stored":
        if not _trains(record.base):
            raise ValueError(
                f"{name}: start=stored needs a uniform grid with contiguous groups, or a type of ggml without flat groups, from a quantize "
                "stage before; use start=gptq"
            )
        return quantized(record, record.base, config.activations or record.activations), {}
    if config.start == "gptq":
        return gptq(record, target_OI, statistics, GptqConfig(*grid, activations=config.activations, grid=config.grid))
    return rtn(record, target_OI, statistics, RtnConfig(*grid, activations=config.activations, grid=config.grid))


def _trained(
    problem: BlockProblem, configs: Mapping[str, TrainedConfig], stepper: Callable[[Sequence[Latent]], Step]
) -> tuple[Records, Metrics]:
    """The block's records after training its windows in turn, never with a higher loss over all samples than it began with."""
    config = next(iter(configs.values()))
    latents, metrics = _begin(problem, configs)
    if config.target == "compressed":
        problem = replace(problem, outputs_NTD=problem.keep(_compressed_targets(problem, config.batch_size)))
    records = {name: latent.record() for name, latent in latents.items()}
    parts = [names for part in problem.parts if (names := [n for n in part if n in latents])] if config.window == "sub_block" else []
    if len(parts) < 2:
        records, of_block = _fit(problem, latents, {}, config, stepper)
    else:
        start, of_block = records, {"block_loss_start": _loss_over_all(problem, _dense(records), config), "best_step": 0.0}
        for number, names in enumerate(parts):
            others = {n: problem.targets[n] for later in parts[number + 1 :] for n in later} | _dense(
                {n: records[n] for earlier in parts[:number] for n in earlier}
            )
            fitted, part = _fit(problem, {n: latents[n] for n in names}, others, config, stepper)
            records, of_block["best_step"] = records | fitted, of_block["best_step"] + part["best_step"]
        of_block["block_loss_best"] = _loss_over_all(problem, _dense(records), config)
        if of_block["block_loss_best"] > of_block["block_loss_start"]:
            records, of_block["block_loss_best"], of_block["best_step"] = start, of_block["block_loss_start"], 0.0
    return records, {name: of_matrix | of_block for name, of_matrix in metrics.items()}


def _fit(
    problem: BlockProblem,
    latents: dict[str, Latent],
    others: dict[str, Tensor],
    config: TrainedConfig,
    stepper: Callable[[Sequence[Latent]], Step],
) -> tuple[Records, dict[str, float]]:
    """Updates of these matrices on random samples, all others as given; the best of the evaluated iterates, as stored, is returned."""
    step = stepper(list(latents.values()))
    generator = torch.Generator().manual_seed(problem.seed)
    best = {name: latent.record() for name, latent in latents.items()}
    start = lowest = _loss_over_all(problem, others | _dense(best), config)
    best_step, every = 0, max(1, config.steps // EVALUATIONS)
    for index in range(config.steps):
        problem.pause()
        drawn = _drawn(problem.slots(), index, config.batch_size, generator)
        for latent in latents.values():
            for parameter in latent.parameters():
                parameter.grad = None
        with torch.enable_grad(), matmuls(config.matmul):
            matrices = {name: latent.effective() for name, latent in latents.items()}
            torch.autograd.backward(list(matrices.values()), _gradients(problem, others, matrices, drawn, config))
        step(index / config.steps)
        if (index + 1) % every == 0 or index + 1 == config.steps:
            records = {name: latent.record() for name, latent in latents.items()}
            loss = _loss_over_all(problem, others | _dense(records), config)
            if loss < lowest:
                best, lowest, best_step = records, loss, index + 1
    return best, {"block_loss_start": start, "block_loss_best": lowest, "best_step": float(best_step)}


def _drawn(slots: Sequence[Sequence[int]], step: int, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Of every slot the samples of a step. Slots take turns, so that processes have equally many."""
    drawn: list[list[int]] = [[] for _ in slots]
    for turn in range(step * batch_size, (step + 1) * batch_size):
        slot = turn % len(slots)
        drawn[slot].append(slots[slot][int(torch.randint(len(slots[slot]), (), generator=generator))])
    return drawn


def _gradients(
    problem: BlockProblem,
    others: Mapping[str, Tensor],
    matrices: Mapping[str, Tensor],
    drawn: Sequence[Sequence[int]],
    config: TrainedConfig,
) -> list[Tensor]:
    """Of the mean loss over the samples drawn, for every matrix, on every process: slot by slot, in their order."""
    leaves, share = {name: matrix.detach().contiguous().requires_grad_(True) for name, matrix in matrices.items()}, problem.share
    numbers = sum(leaf.numel() for leaf in leaves.values())
    total = None if share.size == 1 else share.ordered_sum(next(iter(leaves.values())).new_empty(numbers))
    for slot in share.turns([bool(numbers) for numbers in drawn]):
        if slot is not None:
            rows = torch.tensor(drawn[slot])
            x_BTD, wanted_BTD = (samples[rows][:, : config.seq_len] for samples in (problem.inputs_NTD, problem.outputs_NTD))
            loss = _loss(problem.forward({**others, **leaves}, x_BTD), wanted_BTD, config.outliers)
            torch.autograd.backward(loss * (len(rows) / config.batch_size))
        if total is not None:
            total.add(None if slot is None else torch.cat([_taken(leaf).view(-1) for leaf in leaves.values()]))
    if total is None:
        return [_taken(leaf) for leaf in leaves.values()]
    parts = total.total().split([leaf.numel() for leaf in leaves.values()])
    return [part.view(leaf.shape) for part, leaf in zip(parts, leaves.values(), strict=True)]


def _taken(leaf: Tensor) -> Tensor:
    """Its gradient, which it loses."""
    gradient, leaf.grad = leaf.grad, None
    return torch.full_like(leaf, -0.0, requires_grad=False) if gradient is None else gradient.contiguous()  # x + −0 is x, were it −0 itself


@torch.no_grad()
def _compressed_targets(problem: BlockProblem, batch_size: int) -> Iterator[Tensor]:
    """What the dense block makes of the compressed model's states, of the samples that are here."""
    for rows in _batches(sorted(number for numbers in problem.own_slots().values() for number in numbers), batch_size):
        yield problem.forward(problem.targets, problem.inputs_NTD[rows])


def _batches(numbers: Sequence[int], size: int) -> Iterator[Tensor]:
    for start in range(0, len(numbers), size):
        yield torch.tensor(numbers[start : start + size])


def _dense(records: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    return {name: record.dense() for name, record in records.items()}


def _loss(out_BTD: Tensor, wanted_BTD: Tensor, outliers: float) -> Tensor:
    """Mean squared error, without the `outliers` largest share."""
    errors = (out_BTD.float() - wanted_BTD.float()).square().view(-1)
    dropped = int(outliers * errors.numel())
    if not dropped:
        return errors.mean()
    limit = errors.detach().topk(dropped + 1).values[-1]
    return (errors * (errors <= limit)).sum() / (errors.numel() - dropped)


@torch.no_grad()
def _loss_over_all(problem: BlockProblem, matrices: dict[str, Tensor], config: TrainedConfig) -> float:
    """Mean over all samples, of their first `seq_len` tokens (they see no later ones)."""
    losses: dict[int, float] = {}
    for slot, numbers in problem.own_slots().items():
        losses[slot] = 0.0
        for rows in _batches(numbers, config.batch_size):
            x_BTD, wanted_BTD = (samples[rows][:, : config.seq_len] for samples in (problem.inputs_NTD, problem.outputs_NTD))
            losses[slot] += float(_loss(problem.forward(matrices, x_BTD), wanted_BTD, config.outliers)) * len(rows)
    return sum(problem.share.in_order(losses)) / sum(map(len, problem.slots()))
