"""Predicted costs of a model that is trained whole: work, and the peak bytes on the device and on the host.

Knows the order in which `recover.train` and `stages/recover` do things; activations come from the model's own code run without bytes. Blocks
that are fitted in turn are in `reconstruction_costs`.
"""

from dataclasses import dataclass

import torch

from ...compress.gptq import GptqConfig
from ...recover.activations import Activations
from ...recover.fits import virtual_tokens
from ...recover.memory import COPIES
from ...recover.rate_search import USUAL_TRIES, try_steps
from ...recover.reconstruct import Reconstruct
from ...recover.selection import is_norm, where
from ...recover.training_run import TrainConfig
from ..devices.rates import Work
from ..models.sizes import Sizes
from ..models.structure import Site
from ..recipes.stage_settings import StageSpec
from ..stages import inputs
from ..stages.recover import ROOM, saved_every
from ..stages.teacher import TEACHER_TOKENS, tokens_ahead
from .anatomy import Anatomy, TrainingStep
from .cost_plan import DENSE, OPENED, CostPlan, Needs
from .division import MICRO_BATCHES, Divided, Exchange, in_turn
from .stage_costs import compressed

F32 = torch.float32
WHOLE = frozenset({"full", "qat", "dequantize_train_requantize", "diff_pruning"})
"""Methods whose trained values are the matrices themselves."""
GROUP = 64
"""Weights of a scale, where a stage's parent does not say."""


@dataclass(frozen=True)
class Rebuilding:
    """What `recover.compressed_linear.cache_dense` decides of so many weights: `base` and `own` are the bytes of one in the base's matrix, and in
    the one that training makes of it."""

    weights: int
    base: int
    own: int
    budget: float

    @property
    def cached(self) -> bool:
        return self.weights * (self.base + self.own) <= self.budget or (not self.own and self.held)

    @property
    def held(self) -> bool:
        return self.weights * (self.own or self.base) <= self.budget

    @property
    def kept_bytes(self) -> int:
        return self.weights * (self.base * self.cached + self.own * self.held)


def recovered(plan: CostPlan, spec: StageSpec, sizes: Sizes, budget: float, room: float) -> Needs:
    """A method that trains the whole model. `sizes`: what its parent stores; `budget`: bytes of rebuilt matrices that may be kept; `room`: bytes
    of the device, by which gradient_checkpointing: auto is decided."""
    anatomy, config = plan.anatomy, spec.config
    linears = [s for s in anatomy.structure.sites if s.block is not None]
    trained = trained_numbers(anatomy, spec, config, linears, sizes)
    rebuilt = [s.shape[0] * s.shape[1] for s in linears if sizes.of[s.name].compressed]
    packed = sum(sizes.of[s.name].bits / 8 if sizes.of[s.name].compressed else s.shape[0] * s.shape[1] * plan.element for s in linears)
    others = anatomy.in_blocks - sum(s.shape[0] * s.shape[1] for s in linears)
    moved = any(getattr(config, name, False) for name in ("scales", "zeros")) or spec.method in ("scales", *WHOLE)
    base = 0 if spec.method in WHOLE else F32.itemsize if moved else plan.itemsize
    building = Rebuilding(sum(rebuilt), base, plan.itemsize if moved else 0, budget)
    dense = building.kept_bytes + (0 if building.cached else max(rebuilt, default=0) * base)
    passing = max(rebuilt, default=0) * 4.0 * (3 if moved else 1)
    weights = packed + others * plan.itemsize + plan.outside_bytes + dense + passing + trained * 4.0 * COPIES
    checkpointing = config.gradient_checkpointing is True
    step = anatomy.step(config.batch_size, config.seq_len, plan.dtype, checkpointing, config.loss)
    if config.gradient_checkpointing == "auto" and step.activations.peak > ROOM * (room - weights) and virtual_tokens(config) == 0:
        checkpointing = True
        step = anatomy.step(config.batch_size, config.seq_len, plan.dtype, checkpointing, config.loss)
    acting = _acting(plan, step.activations, config, teacher=config.loss != "cross_entropy")
    teacher = 0.0 if config.loss == "cross_entropy" else plan.outside_bytes
    device = weights + teacher + acting
    host = anatomy.outside * plan.element + max(packed / anatomy.blocks, anatomy.block_parameters * plan.element) * 2
    if config.loss != "cross_entropy":
        host += plan.hidden_bytes(max(0.0, _ahead(plan, config) - TEACHER_TOKENS))
    steps, judging, once = _training(plan, step, config, checkpointing, building)
    work = steps + judging * (2 + _evaluations(config)) + once
    shared, sent = _micro_batches(config, steps, judging), _gradients_sent(anatomy, config, trained, getattr(config, "shard", False))
    alone = {"opening": OPENED * 3, "rebuilding matrices": once + -1 * (OPENED * 3), "judging what is stored": judging}
    if getattr(config, "quantizer", None) != "gptq":
        parted = trained * 4.0 * (COPIES - 2 / anatomy.blocks) if getattr(config, "shard", False) else 0.0  # a block is whole while it runs
        return Needs(work, device, host, divided=shared, alone=alone, sent=sent, parted=parted)
    rounding = compressed(plan, StageSpec("quantize", spec.address, "gptq", GptqConfig()), True, False, 0.0)
    walking = rounding.device - plan.outside_bytes - plan.block_bytes
    device = max(device, weights + plan.outside_bytes + walking)
    return Needs(work + rounding.work, device, host, rounding.hidden, shared, alone | {"rounding by GPTQ": rounding.work}, sent)


def _acting(plan: CostPlan, activations: Activations, config: TrainConfig, teacher: bool) -> float:
    """The most of: a step's own activations; what waits for backward while the teacher runs ahead through its blocks."""
    if not teacher:
        return activations.peak
    step = config.batch_size * config.seq_len
    ahead = max(step, min(TEACHER_TOKENS, config.steps * config.accumulation * step))  # what goes further is in the host's memory
    running = plan.anatomy.forward(config.batch_size, config.seq_len, plan.dtype).peak
    walking = 2 * plan.hidden_bytes(ahead) + plan.block_bytes * 1.5 + running
    return max(activations.peak + plan.hidden_bytes(ahead), activations.saved + walking)


def _ahead(plan: CostPlan, config: TrainConfig) -> float:
    """Tokens of one pass of the teacher."""
    wanted = config.steps * config.accumulation * config.batch_size * config.seq_len
    return min(tokens_ahead(plan.device, int(plan.hidden_bytes(1))), wanted)


def _training(
    plan: CostPlan, step: TrainingStep, config: TrainConfig, checkpointing: bool, building: Rebuilding
) -> tuple[Work, Work, Work]:
    """Steps with the teacher's passes; one evaluation on the held-out text (of the start, five, and the records as they are stored); what comes
    once."""
    anatomy, tokens = plan.anatomy, float(config.batch_size * config.seq_len)
    forward = tokens * anatomy.blocks * anatomy.products()
    uses = 2.0 + (1.0 if checkpointing else 0.0)
    passes = uses + (1.0 if building.own else 0.0)
    attention = 2.0 * tokens * config.seq_len * anatomy.width * anatomy.blocks * (3.5 + (1.0 if checkpointing else 0.0))
    micro = step.work * anatomy.blocks + step.of_loss + Work({plan.dtype: passes * forward + attention})
    dense = Work(passes=4 * DENSE * building.weights, calls=20 * len(anatomy.sites()) * anatomy.blocks)
    made = (Work() if building.cached else dense) + (Work(passes=4 * 3.0 * building.weights) if building.own else Work())
    micro += made * (1 / config.accumulation if building.held else uses)
    if building.own:  # sums of the gradient by group
        micro += Work(passes=4 * 3.0 * building.weights)
    walked = plan.pass_of(tokens, config.seq_len) * anatomy.blocks
    if config.loss != "cross_entropy":
        micro += walked + plan.loaded(False) * (anatomy.blocks * tokens / max(_ahead(plan, config), tokens))
    held = float(sum(held_out_windows(config)) * config.seq_len)
    head = Work({plan.dtype: held * anatomy.vocabulary * anatomy.width}, passes=held * anatomy.vocabulary * 16.0)
    evaluation = plan.pass_of(held, config.seq_len) * anatomy.blocks + head + made * (1 if building.held else len(held_out_windows(config)))
    return micro * ((config.steps + _tried(config)) * config.accumulation), evaluation, dense + OPENED * 3


def _evaluations(config: TrainConfig) -> int:
    """On the way and of rates tried, the start and the end apart."""
    every = config.eval_every or max(1, config.steps // 5)
    return -(-config.steps // every) + _tries(config)


def _tries(config: TrainConfig) -> int:
    """Of the search for a rate, where it stays at the default."""
    return USUAL_TRIES if config.learning_rate == "search" else 0


def _tried(config: TrainConfig) -> int:
    """Steps of all tries."""
    return _tries(config) * try_steps(config.steps)


def _micro_batches(config: TrainConfig, steps: Work, judging: Work) -> tuple[Divided, ...]:
    """An update's micro-batches, and the held-out batches, in turn."""
    counts, times = held_out_windows(config), 1 + _evaluations(config)
    micro = in_turn(MICRO_BATCHES, steps, [1.0] * config.accumulation, config.steps + _tried(config))
    return micro, in_turn("held-out batches", judging * times, counts, times)


def held_out_windows(config: TrainConfig | Reconstruct) -> list[int]:
    """Windows of each held-out batch."""
    size = inputs.held_out_size(config.seq_len, config.batch_size)
    full, left = divmod(max(1, inputs.HELD_OUT_TOKENS // config.seq_len), size)
    return [size] * full + ([left] if left else [])


def _gradients_sent(anatomy: Anatomy, config: TrainConfig, trained: float, parts: bool) -> tuple[Exchange, ...]:
    """What ranks exchange while they train (recover/peers, recover/sharded, stages/recover)."""
    every, kept = config.eval_every or max(1, config.steps // 5), saved_every(trained)
    judged = {step for step in range(1, config.steps + 1) if step % every == 0 or step == config.steps}
    saved = set(range(kept, config.steps, kept))
    steps, judgings = config.steps + _tried(config), 1 + len(judged) + _tries(config)
    of_block, looks = trained / anatomy.blocks, float(anatomy.blocks * judgings)
    gradients = (
        (
            Exchange(
                "weights of blocks, twice, and their gradients",
                "parts",
                of_block,
                4,
                config.accumulation,
                3.0 * anatomy.blocks * steps,
            ),
            Exchange("weights of blocks that are judged", "parts", of_block, 4, len(held_out_windows(config)), looks),
        )
        if parts
        else (Exchange("gradients", "sum", trained, 4, config.accumulation, steps),)
    )
    return (
        *gradients,
        Exchange("losses", "sum", 1.0, 8, config.accumulation, steps),
        Exchange("tokens", "gathered", times=steps),
        Exchange("whether to stop", "agreed", times=steps),
        Exchange("whether to wait", "agreed", times=config.steps - len(judged | saved)),
        Exchange("held-out losses", "gathered", times=judgings),
        Exchange("hashes of what is trained", "gathered", times=1 + len(saved)),
        Exchange("what was written", "broadcast", times=anatomy.blocks + 1.0),
        Exchange("whether training had begun", "broadcast"),
    )


def trained_numbers(anatomy: Anatomy, spec: StageSpec, config: TrainConfig, linears: list[Site], sizes: Sizes) -> float:
    """How many numbers train, about: by the rank of factors, the groups of grids, whole matrices, norms."""
    place = where(anatomy.model, config.targets, config.layers)
    chosen = [s for s in linears if place.linear(s.name)]
    count, rank = 0.0, getattr(config, "rank", 0)
    for site in chosen:
        rows, columns = site.shape
        size = sizes.of[site.name]
        if spec.method in WHOLE:
            count += rows * columns
        if rank:
            count += size.low_rank / 16 if size.low_rank else min(rank, rows, columns) * (rows + columns)
        if spec.method == "scales" or getattr(config, "scales", False):
            count += rows * columns / GROUP if "base.scales" in size.base_names or "base.codes" in size.base_names else 0
    if getattr(config, "norms", False):
        count += sum(m.get_parameter("weight").numel() for n, m in anatomy.model.named_modules() if is_norm(m) and place.holds(n))
    if getattr(config, "biases", False) or spec.method == "bitfit":
        count += sum(s.shape[0] for s in chosen if s.expert is None)
    return count
