"""Predicted costs of blocks that are fitted in turn: work, exchanges, and the peak bytes on the device and on the host.

Knows the order in which `recover.reconstruct` and `stages/block_reconstruction` do things.
"""

from dataclasses import dataclass

from ...recover.memory import COPIES
from ...recover.reconstruct import Reconstruct, resolved
from ..devices.rates import Work
from ..models.sizes import Sizes
from ..ranks.exchange import SLOTS
from ..recipes.stage_settings import StageSpec
from .anatomy import TrainingStep
from .cost_plan import DENSE, OPENED, CostPlan, Needs
from .division import WINDOWS, Divided, Exchange, in_turn
from .recovery_costs import F32, GROUP, Rebuilding, held_out_windows


@dataclass(frozen=True)
class _BlockFits:
    """What the costs of `recover.reconstruct` follow from. `trains`: the parameters (resolved from auto); `budget`: bytes of a block's rebuilt
    matrices that may be kept while it is fitted; `step`: one slot's part of a training step, in all blocks."""

    plan: CostPlan
    config: Reconstruct
    trains: str
    budget: float
    step: TrainingStep

    @classmethod
    def of(cls, plan: CostPlan, config: Reconstruct, sizes: Sizes, budget: float) -> "_BlockFits":
        uniform = any(sizes.of[s.name].compressed and "base.codes" in sizes.of[s.name].base_names for s in plan.anatomy.sites())
        trains = resolved(config, frozenset({"uniform" if uniform else "dense"})).train
        windows = -(-config.batch_size // min(SLOTS, config.batch_size))
        return cls(plan, config, trains, budget, plan.anatomy.step(windows, config.seq_len, plan.dtype, False, "cross_entropy"))

    @property
    def slots(self) -> int:
        """Of a training step."""
        return min(SLOTS, self.config.batch_size)

    @property
    def fits(self) -> int:
        """Trainings of a block: attention and MLP one after the other, or both at once."""
        return 2 if self.config.window == "split" else 1

    @property
    def evaluations(self) -> int:
        """Of a block on the held-out batches, while it is fitted."""
        return self.fits * (1 + -(-self.config.steps // max(1, self.config.steps // 5))) + 2

    @property
    def step_tokens(self) -> float:
        return float(self.config.batch_size * self.config.seq_len)

    @property
    def training_tokens(self) -> float:
        return -(-self.config.samples // self.config.batch_size) * self.step_tokens

    @property
    def held_out_tokens(self) -> float:
        return float(sum(held_out_windows(self.config)) * self.config.seq_len)

    @property
    def weights(self) -> float:
        """Of a block's matrices."""
        return float(sum(s.shape[0] * s.shape[1] for s in self.plan.anatomy.sites()))

    @property
    def trained(self) -> float:
        """Trained numbers of a block."""
        sites = self.plan.anatomy.sites()
        numbers = {"weights": self.weights, "scales": self.weights / GROUP, "norms": 0.0, "biases": float(sum(s.shape[0] for s in sites))}
        return numbers.get(self.trains, float(sum(self.config.rank * (s.shape[0] + s.shape[1]) for s in sites)))

    @property
    def _building(self) -> Rebuilding:
        item = self.plan.itemsize
        base, own = (item, 0) if self.trains == "lora" else (F32.itemsize, item)
        return Rebuilding(int(self.weights), base, own, self.budget)

    @property
    def _rebuilding(self) -> float:
        """Passes over the weights that rebuild the matrices of one forward and backward."""
        return 0.0 if self._building.cached else 2 * DENSE

    def training(self) -> Divided:
        """All steps of all blocks."""
        anatomy, dtype = self.plan.anatomy, self.plan.dtype
        windows = -(-self.config.batch_size // self.slots)
        products = self.step_tokens * anatomy.products() * (3.0 if self.trains in ("scales", "weights") else 2.0)
        step = self.step.work * (self.config.batch_size / windows) + Work({dtype: products})
        step += Work(passes=4 * (self._rebuilding + 12) * self.weights, calls=60 * len(anatomy.sites())) * self.slots
        times = self.config.steps * self.fits * anatomy.blocks
        return in_turn(WINDOWS, step * times, [1.0] * self.slots, times)

    def judging(self) -> Divided:
        """Evaluations on the held-out batches, and their passes through the blocks as they were, as they are and in the dense model."""
        counts, times = held_out_windows(self.config), (self.evaluations + 3) * self.plan.anatomy.blocks
        rebuilding = Work(passes=4 * self._rebuilding / 2 * self.weights * len(counts))
        evaluation = self.plan.pass_of(self.held_out_tokens, self.config.seq_len) + rebuilding
        return in_turn("held-out batches", evaluation * times, counts, times)

    def walking(self) -> Divided:
        """The training text through every block, dense and fitted."""
        batches = -(-self.config.samples // self.config.batch_size)
        work = self.plan.pass_of(self.training_tokens, self.config.seq_len) * (2 * self.plan.anatomy.blocks)
        return in_turn("windows of the training text", work, [float(batches)] * self.slots)

    def loading(self) -> Work:
        blocks = self.plan.anatomy.blocks
        return self.plan.loaded(True) * (4 * blocks) + Work(passes=4 * DENSE * self.weights * self.fits * blocks)

    def device_bytes(self) -> float:
        """The peak: while a block is fitted, or in the head."""
        plan, largest = self.plan, max(s.shape[0] * s.shape[1] for s in self.plan.anatomy.sites())
        acting = self.step.activations.saved / plan.anatomy.blocks + 3 * 4.0 * largest
        kept = float(self._building.kept_bytes) if self.trains != "weights" else 0.0
        fitting = 2 * plan.block_bytes + kept + self.trained * 4.0 * COPIES + acting
        return 2 * plan.outside_bytes + max(fitting, self.step_tokens * plan.anatomy.vocabulary * 4.0 * 3)

    def exchanges(self) -> tuple[Exchange, ...]:
        """What ranks exchange while they fit blocks (recover/reconstruct, stages/block_reconstruction)."""
        blocks, times = self.plan.anatomy.blocks, float(self.fits * self.plan.anatomy.blocks)
        looks_for_norms = self.fits > 1 and (self.config.norms or self.trains == "norms")
        return (
            Exchange("gradients", "sum", float(self.trained) / self.fits, 4, self.slots, times * self.config.steps),
            Exchange("losses", "sum", 1.0, 8, self.slots, times * self.config.steps),
            Exchange("what has a gradient", "gathered", times=times * self.config.steps),
            Exchange("whether to stop", "agreed", times=times * self.config.steps + blocks),
            Exchange("errors of held-out batches", "gathered", times=self.evaluations * blocks + 2.0),
            Exchange("hashes of what is trained", "gathered", times=blocks),
            Exchange("what was written", "broadcast", times=blocks + 1.0),
            Exchange("whether it was undone", "broadcast"),
            *((Exchange("which linear a norm is before", "gathered", times=times),) if looks_for_norms else ()),
        )


def reconstructed(plan: CostPlan, spec: StageSpec, sizes: Sizes, budget: float) -> Needs:
    """Blocks fitted one after the other to their dense counterparts. `budget`: bytes of a block's rebuilt matrices that may be kept meanwhile."""
    config = spec.config
    assert isinstance(config, Reconstruct)
    fits = _BlockFits.of(plan, config, sizes, budget)
    walking, training, judging, loading = fits.walking(), fits.training(), fits.judging(), fits.loading()
    work = training.whole() + judging.whole() + walking.whole() + loading + OPENED * 2
    states = plan.hidden_bytes(fits.training_tokens) * 2 + plan.hidden_bytes(fits.held_out_tokens) * 3
    host = plan.anatomy.outside * plan.element
    alone = {"loading": loading, "opening": OPENED * 2}
    return Needs(work, fits.device_bytes(), host, states, (walking, training, judging), alone, fits.exchanges())
