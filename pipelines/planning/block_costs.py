"""Costs of methods that work on a whole decoder block: SVDQuant's search, and blocks under training (`compress/block_training`).

A step's windows and the samples that judge it are divided by slots, the matrices' starts by owners; rounding and moving the weights is what every
rank repeats. Knows shapes and configs; no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compress.block_training import EVALUATIONS
from ...compress.decompose import Decomposition
from ..devices.rates import Work
from ..models.structure import Site
from ..ranks.exchange import SLOTS
from ..recipes.stage_settings import StageSpec
from .cost_plan import DENSE, CostPlan
from .division import WINDOWS, Divided, Exchange, in_turn
from .solver_costs import Cost, solver_cost

F32 = torch.float32
LATENT = 40.0
"""Reads and writes of a weight in float32 while a latent is rounded, goes back and is moved."""
COPIES = {"learned_rounding": 10.0, "block_training": 11.0}
"""Of a block's weights in float32 that are alive at most: the trained values and what moves them, the matrices and their gradients."""


def smoothed(config: Any, site: Site, records: bool) -> Cost:
    """svdquant: rounded once, a term for each exponent, then the schedule."""
    rank, rows, columns = config.rank, *site.shape
    attempt = solver_cost("decompose", "", Decomposition(rank, "plain", True, config.quantizer, "none"), site.shape, True)
    final = solver_cost("decompose", "", Decomposition(rank, "plain", True, config.quantizer, config.clip), site.shape, True)
    seen = Work({F32: 2.0 * 512 * rows * columns})
    return Cost((attempt.work + seen) * (config.smoothing_steps + 1) + (final.work + seen) * config.iterations, final.peak)


@dataclass(frozen=True)
class BlockTraining:
    """One block under training: `windows` of all steps forward and back, `judging` over all samples, `repeated` on every rank; `trainings` of `steps`
    updates each, which look at all samples `evaluations` times."""

    windows: Work
    judging: Work
    repeated: Work
    peak: float
    trainings: int
    steps: int
    evaluations: int
    units: int
    weights: float

    @property
    def work(self) -> Work:
        return self.windows + self.judging + self.repeated

    def divided(self, blocks: int, slots: Sequence[float]) -> tuple[Divided, ...]:
        times = float(self.trainings * blocks)
        return (
            in_turn(WINDOWS, self.windows * blocks, [1.0] * self.units, times * self.steps),
            in_turn("samples that judge a block", self.judging * blocks, slots, times * self.evaluations),
        )

    def sent(self, blocks: int) -> tuple[Exchange, ...]:
        times = float(self.trainings * blocks)
        whole = 2.0 * blocks if self.trainings > 1 else 0.0
        return (
            Exchange("gradients of matrices", "sum", self.weights / self.trainings, 4, self.units, times * self.steps),
            Exchange("whether to go on training", "agreed", times=times * self.steps),
            Exchange("losses of samples", "gathered", times=times * self.evaluations + whole),
            Exchange("hashes of records", "gathered", times=blocks),
        )


def trained(plan: CostPlan, spec: StageSpec, sites: list[Site]) -> BlockTraining:
    """Steps and evaluations, in float32."""
    config, anatomy, calibration = spec.config, plan.anatomy, plan.recipe.calibration
    weights = float(sum(s.shape[0] * s.shape[1] for s in sites))
    seq_len, samples = min(config.seq_len, calibration.seq_len), calibration.samples
    trainings = 2 if config.window == "sub_block" else 1
    at_once, units = config.batch_size * seq_len, min(config.batch_size, len(plan.slots(samples, calibration.seq_len)))
    of_slot = -(-config.batch_size // units)
    between = anatomy.step(of_slot, seq_len, plan.dtype, False, "cross_entropy")
    blocks = 2 if config.window == "two_blocks" else 1
    windows = Work({plan.dtype: (2.0 * blocks + 1.0) * at_once * anatomy.products()}) + between.work * (
        blocks * config.batch_size / of_slot
    )
    windows += Work(passes=12.0 * weights * units)
    repeated = Work(passes=4 * LATENT * weights, calls=60 * len(sites))
    evaluations = 1 + -(-config.steps // max(1, config.steps // EVALUATIONS))
    judging = plan.pass_of(samples * seq_len, seq_len) * blocks
    records = Work(passes=4 * (DENSE + 30) * weights, calls=80 * len(sites))
    return BlockTraining(
        windows * (config.steps * trainings),
        judging * (evaluations * trainings),
        (repeated * config.steps + records * evaluations) * trainings,
        4 * COPIES[spec.method] * weights + blocks * 1.4 * between.activations.saved / anatomy.blocks,
        trainings,
        config.steps,
        evaluations,
        min(SLOTS, units),
        weights,
    )
