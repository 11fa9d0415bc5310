"""What a stage takes on a device: work, and the most bytes on the device and on the host, for the stages that walk block by block.

Knows the order in which `stages/compress`, `perplexity` and `stages/fuse` do things; what a matrix costs is `solver_costs`, what a block's own
code does between its products `anatomy`. Recovery is in `recovery_costs`. Reads no weights.
Legend: N windows, T tokens, O out, I in, D model, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...compress.smooth import SvdQuantConfig
from ...compress.statistics import SAMPLES
from ..devices.rates import Work
from ..evaluation.perplexity import LOGITS_AT_ONCE, TOKENS_AT_ONCE, batches
from ..models.sizes import rounded_to_nearest
from ..models.structure import Site, is_tied
from ..ranks.exchange import SLOTS
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec, methods
from ..stages.shared_inputs import solving_cost
from .anatomy import Anatomy
from .division import SLOTS_OF_TEXT, Divided, Exchange, Piece, in_turn
from .solver_costs import Cost, factor_work, solver_cost

F32 = torch.float32
OPENED = Work(calls=50_000)
"""A model opened for running: its modules made, its structure found, a block tried."""
DENSE = 14.0
"""Reads and writes of a weight in float32 while a record is made dense, counted on 3- and 4-bit codes."""
RUNNING_BYTES = 20e6
"""Of host memory once products run: what kernels prepare and an allocator keeps, measured on models of 2 and 4 blocks."""
READ_AHEAD = 2
"""Blocks of an artifact that lie in host memory: the one that is computed on, and the next."""
LOGIT_COPIES = 6
"""Of a span's logits in float32 while they are scored beside the teacher's."""
ATTENTION_SHARE = 2.0
"""Multiply-adds of fused attention run at this share of the seconds of plain products of as many."""


@dataclass(frozen=True)
class Needs:
    """`device`: bytes of tensors on the run's device; `host`: bytes of this process besides (on a CPU both are one memory); `hidden`: bytes of
    hidden states, which lie on the device, in host memory or in files, as there is room. Of `work`, all that one process does: `divided` is what
    several ranks share, `alone` names what is left, which every rank repeats or waits for; `sent` is what goes from rank to rank."""

    work: Work
    device: float
    host: float
    hidden: float = 0.0
    divided: tuple[Divided, ...] = ()
    alone: Mapping[str, Work] = field(default_factory=dict)
    sent: tuple[Exchange, ...] = ()

    def most(self, other: "Needs") -> "Needs":
        """Both one after the other."""
        device, host, hidden = max(self.device, other.device), max(self.host, other.host), max(self.hidden, other.hidden)
        alone = {name: self.alone.get(name, Work()) + other.alone.get(name, Work()) for name in {**self.alone, **other.alone}}
        return Needs(self.work + other.work, device, host, hidden, self.divided + other.divided, alone, self.sent + other.sent)


@dataclass(frozen=True)
class CostPlan:
    """What all stages of a run share: the model, the recipe, the device and dtype of forward passes, bytes of a stored number."""

    anatomy: Anatomy
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    element: float

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def outside_bytes(self) -> float:
        return self.anatomy.outside * self.itemsize

    @property
    def block_bytes(self) -> float:
        return self.anatomy.block_parameters * self.itemsize

    def hidden_bytes(self, tokens: float) -> float:
        return tokens * self.anatomy.width * self.itemsize

    def batch(self, seq_len: int) -> int:
        return max(1, TOKENS_AT_ONCE // seq_len)

    def batches(self, windows: int, seq_len: int) -> list[int]:
        """Windows of each batch."""
        return [part.stop - part.start for part in batches(windows, seq_len)]

    def pass_of(self, tokens: float, seq_len: int, sites: list[Site] | None = None) -> Work:
        """Tokens through one block, or through its products with some matrices alone."""
        batch = self.batch(seq_len)
        between = self.anatomy.forward(batch, seq_len, self.dtype)
        attention = ATTENTION_SHARE * tokens * seq_len * self.anatomy.width
        products = Work({self.dtype: tokens * self.anatomy.products(sites) + attention})
        return products + between.work * (tokens / (batch * seq_len))

    def running_bytes(self, windows: int, seq_len: int) -> float:
        """What one block holds besides its weights and its input while a batch runs."""
        return self.anatomy.forward(min(windows, self.batch(seq_len)), seq_len, self.dtype).peak

    def loaded(self, records: bool) -> Work:
        """One block read, and made dense where it holds records."""
        count = self.anatomy.block_parameters
        return Work(passes=count * (4 * DENSE if records else 2 * self.element + self.itemsize), calls=300)


def evaluated(plan: CostPlan, windows: int, records: bool, teacher: bool) -> Needs:
    """An artifact scored: every window through every block, then through the head, beside the teacher's states."""
    anatomy, seq_len = plan.anatomy, plan.recipe.evaluation.seq_len
    tokens, models = float(windows * seq_len), 2 if teacher else 1
    work = (plan.pass_of(tokens, seq_len) + plan.loaded(records)) * anatomy.blocks
    logits = tokens * anatomy.vocabulary
    scored = Work(
        {plan.dtype: models * logits * anatomy.width}, passes=logits * 4.0 * (26 if teacher else 12), calls=tokens / LOGITS_AT_ONCE * 60
    )
    work += scored
    work += OPENED
    shared = in_turn("evaluation batches", plan.pass_of(tokens, seq_len) * anatomy.blocks + scored, plan.batches(windows, seq_len))
    alone = {"loading": plan.loaded(records) * anatomy.blocks, "opening": OPENED}
    hidden = plan.hidden_bytes(tokens)
    span = min(LOGITS_AT_ONCE, seq_len) * anatomy.vocabulary * 4.0 * (LOGIT_COPIES if teacher else LOGIT_COPIES / 2)
    walking = plan.block_bytes + plan.running_bytes(windows, seq_len)
    device = plan.outside_bytes * models + max(walking, span)
    host = max(anatomy.outside, READ_AHEAD * anatomy.block_parameters) * plan.element
    return Needs(work, device, host, hidden, (shared,), alone, _scores_sent(hidden, windows, teacher))


def compressed(plan: CostPlan, spec: StageSpec, records: bool, first: bool, written: float) -> Needs:
    """A prune, quantize or decompose stage. `records`: its parent holds some; `first`: its parent is the baseline; `written`: bytes of
    the artifact it leaves."""
    anatomy, row = plan.anatomy, methods(spec.name)[spec.method]
    sites = [s for s in anatomy.sites() if not spec.skips(s.name)]
    needs = frozenset[str]().union(*(row.needs(spec.config_for(s.name)) for s in sites)) if sites else frozenset()
    looks = bool(needs - {"fisher"}) or row.scope == "block"
    twin = (row.inputs == "dense" and not first) or "cross_moment" in needs or row.dense_outputs
    seq_len, windows = plan.recipe.calibration.seq_len, plan.recipe.calibration.samples
    if not looks:  # a few tokens, for the errors alone
        seq_len = min(seq_len, SAMPLES)
        windows = min(windows, -(-SAMPLES // seq_len))
    tokens = float(windows * seq_len)
    solving, kept, pieces = _solved(plan, spec, sites, needs, records, tokens)
    writing = Work(files=written / anatomy.blocks, calls=500)
    work = solving.work + writing
    passes = 2.0 + ((1.0 if "cross_moment" in needs else 0.0) + 1.0 if twin else 0.0)
    passes += len(anatomy.inputs(sites)) - 1 if spec.true_sequential and looks else 0
    last = [] if row.scope == "block" or not sites else anatomy.inputs(sites)[-1]
    loading = plan.loaded(records) * (2 if twin else 1)
    running = plan.pass_of(tokens, seq_len) * passes
    work += running + loading
    unneeded, read_back = Work({plan.dtype: -tokens * anatomy.products(last)}), Work(passes=anatomy.block_parameters * 4 * DENSE)
    work += unneeded + read_back
    gathered = gathering(plan, anatomy.inputs(sites), needs, tokens)
    work += gathered
    models = 2 if twin else 1
    hidden = plan.hidden_bytes(tokens) * (models + row.dense_outputs)
    held = plan.outside_bytes * models + plan.block_bytes * models
    alone = {"writing": writing, "loading": loading + read_back}
    if row.scope == "block" and hasattr(spec.config, "steps"):
        trained = _trained(plan, spec, sites, tokens)
        work, held = work + trained.work, held + kept
        solving = replace(solving, peak=max(solving.peak, trained.peak))
    if row.scope == "block":
        alone["blocks trained as a whole"] = work + -1 * (running + unneeded + gathered + writing + loading + read_back)
    device = held + max(solving.peak, plan.running_bytes(windows, seq_len))
    read = anatomy.block_parameters * plan.element * (1 if first else 2)
    opening = OPENED * (2 if twin else 1)
    whole = Needs(
        work * anatomy.blocks + opening,
        device,
        max(anatomy.outside * plan.element, READ_AHEAD * read) + written / anatomy.blocks + RUNNING_BYTES,
        hidden,
        _shared(plan, (running + unneeded + gathered) * anatomy.blocks, windows, seq_len, pieces if row.scope == "matrix" else None),
        {name: each * anatomy.blocks for name, each in alone.items()} | {"opening": opening},
        _sums_sent(plan, spec, sites, needs, windows, seq_len),
    )
    return _with_rest(plan, spec, whole)


def _shared(plan: CostPlan, running: Work, windows: int, seq_len: int, solving: Divided | None) -> tuple[Divided, ...]:
    """Batches of calibration text by slots; matrices by owners, where they are solved one by one."""
    slots: dict[int, float] = {}
    for number, count in enumerate(plan.batches(windows, seq_len)):
        slots[number % SLOTS] = slots.get(number % SLOTS, 0.0) + count
    result = in_turn(SLOTS_OF_TEXT, running, list(slots.values()))
    return (result,) if solving is None else (result, solving)


def _with_rest(plan: CostPlan, spec: StageSpec, result: Needs) -> Needs:
    """The head and the embeddings, where they are compressed: one matrix at a time, whole."""
    anatomy = plan.anatomy
    rest = [anatomy.head] if spec.include_head and anatomy.head is not None else []
    for site in rest:
        cost = solver_cost(spec.name, spec.method, spec.config_for(site.name), site.shape, True)
        result = result.most(Needs(cost.work, plan.outside_bytes + 4.0 * site.shape[0] * site.shape[1] + cost.peak, result.host))
    nearest = rounded_to_nearest(spec, anatomy.structure, is_tied(anatomy.model, anatomy.structure))
    for key, site in nearest.items():
        cost = solver_cost("quantize", "rtn", spec.embedding_config(site.shape[1], getattr(spec, key)), site.shape, False)
        result = result.most(Needs(cost.work, plan.outside_bytes + 4.0 * site.shape[0] * site.shape[1] + cost.peak, result.host))
    return result


def gathering(plan: CostPlan, inputs: list[list[Site]], needs: frozenset[str], tokens: float) -> Work:
    """Gathering what methods want to know of every input."""
    work = Work()
    for together in inputs:
        width, reach = together[0].shape[1], tokens * (plan.anatomy.active if together[0].expert is not None else 1.0)
        squares = (0.6 if "second_moment" in needs else 0.0) + (1.0 if "cross_moment" in needs else 0.0)
        work += Work({F32: squares * reach * width**2}, passes=reach * width * 12.0, calls=reach / TOKENS_AT_ONCE * (4 + width / 256))
    return work


def _solved(
    plan: CostPlan, spec: StageSpec, sites: list[Site], needs: frozenset[str], records: bool, tokens: float
) -> tuple[Cost, float, Divided]:
    """(work of a block's matrices and the most bytes beside the block, bytes of the statistics that all of them keep, the same work in
    pieces that owners solve)."""
    squares = 4.0 * (("second_moment" in needs) + ("cross_moment" in needs))
    kept, work, peak = 0.0, Work(), 0.0
    pieces, first = list[Piece](), dict[int, Work]()
    for number, together in enumerate(plan.anatomy.inputs(sites)):
        width = together[0].shape[1]
        kept += squares * width**2 + 4.0 * SAMPLES * width
        result, solving = 0.0, dict[str, Work]()
        for site in together:
            cost = _of_matrix(spec, site, records)
            rows, columns = site.shape
            solving[site.name] = cost.work + Work(
                {F32: 2.0 * rows * columns * SAMPLES}, passes=4.0 * rows * columns * (2 * DENSE + 10), calls=100
            )
            work += solving[site.name]
            measured = 4.0 * rows * (2 * columns + SAMPLES)
            peak = max(peak, kept + 4.0 * rows * columns * 1.5 + max(cost.peak, measured))
            result = max(result, cost.kept)
        for config, rows in _stacks(spec, together).items():
            cost = solver_cost(spec.name, spec.method, config, (rows, width), records)
            peak = max(peak, kept + 4.0 * rows * width * 1.5 + cost.peak)
        first[number] = factor_work(width) if result else Work()
        work += first[number]
        kept += result
        for few in _units(spec, together):
            own = sum((solving[site.name] for site in few), Work())
            pieces.append(Piece(own, solving_cost(few), number))
    return Cost(work, max(peak, kept)), kept, Divided("matrices of a block", tuple(pieces), plan.anatomy.blocks, first, by_cost=True)


def _units(spec: StageSpec, together: list[Site]) -> list[list[Site]]:
    """Of the sites of one input, those that one rank solves: all that a method solves at once (stages/shared_inputs), else each."""
    row, out = methods(spec.name)[spec.method], dict[Any, list[Site]]()
    for site in together:
        config = spec.config_for(site.name)
        out.setdefault(config if row.together is not None and getattr(config, "shared", True) else site.name, []).append(site)
    return list(out.values())


def _stacks(spec: StageSpec, together: list[Site]) -> dict[object, int]:
    """Config → rows of the matrices of one input that a method solves at once (stages/shared_inputs)."""
    row, out = methods(spec.name)[spec.method], dict[Any, int]()
    for site in together:
        config = spec.config_for(site.name)
        if row.together is not None and getattr(config, "shared", True):
            out[config] = out.get(config, 0) + site.shape[0]
    return out


def _of_matrix(spec: StageSpec, site: Site, records: bool) -> Cost:
    config, row = spec.config_for(site.name), methods(spec.name)[spec.method]
    if row.scope != "block":
        return solver_cost(spec.name, spec.method, config, site.shape, records)
    if not hasattr(config, "start"):
        return _smoothed(config, site, records)
    method = {"gptq": "gptq", "rtn": "rtn", "stored": "rtn"}[config.start]
    return solver_cost("quantize", method, config, site.shape, records)


def _smoothed(config: SvdQuantConfig, site: Site, records: bool) -> Cost:
    """svdquant: rounded once, a term for each exponent, then the schedule."""
    from ...compress.decompose import Decomposition

    rank, rows, columns = config.rank, *site.shape
    attempt = solver_cost("decompose", "", Decomposition(rank, "plain", True, config.quantizer, "none"), site.shape, True)
    final = solver_cost("decompose", "", Decomposition(rank, "plain", True, config.quantizer, config.clip), site.shape, True)
    seen = Work({F32: 2.0 * 512 * rows * columns})
    return Cost((attempt.work + seen) * (config.smoothing_steps + 1) + (final.work + seen) * config.iterations, final.peak)


def _trained(plan: CostPlan, spec: StageSpec, sites: list[Site], tokens: float) -> Cost:
    """A block trained as a whole (`compress/block_training`): steps, evaluations over all samples; in float32."""
    from ...compress.block_training import EVALUATIONS

    config, anatomy = spec.config, plan.anatomy
    weights = float(sum(s.shape[0] * s.shape[1] for s in sites))
    seq_len = min(config.seq_len, plan.recipe.calibration.seq_len)
    samples = plan.recipe.calibration.samples
    parts = 2 if config.window == "sub_block" else 1
    at_once = config.batch_size * seq_len
    between = anatomy.step(config.batch_size, seq_len, plan.dtype, False, "cross_entropy")
    blocks = 2 if config.window == "two_blocks" else 1
    step = Work({plan.dtype: 2.0 * blocks * at_once * anatomy.products()}) + between.work * blocks
    step += Work({plan.dtype: float(at_once * anatomy.products())}) + Work(passes=4 * LATENT * weights, calls=60 * len(sites))
    every = max(1, config.steps // EVALUATIONS)
    evaluations = 1 + -(-config.steps // every)
    evaluation = plan.pass_of(samples * seq_len, seq_len) * blocks + Work(passes=4 * (DENSE + 30) * weights, calls=80 * len(sites))
    copies = 9.0 if spec.method == "learned_rounding" else 10.0
    peak = 4 * copies * weights + blocks * 1.4 * between.activations.saved / anatomy.blocks
    work = (step * config.steps + evaluation * evaluations) * parts
    return Cost(work, peak)


LATENT = 40.0
"""Reads and writes of a weight in float32 while a latent is rounded, goes back and is moved."""


def _sums_sent(
    plan: CostPlan, spec: StageSpec, sites: list[Site], needs: frozenset[str], windows: int, seq_len: int
) -> tuple[Exchange, ...]:
    """What ranks tell one another about a stage's blocks (models/slot_sums, stages/shared_inputs, store/artifact)."""
    blocks, inputs = plan.anatomy.blocks, plan.anatomy.inputs(sites)
    slots = min(SLOTS, len(plan.batches(windows, seq_len)))
    rows = min(SAMPLES, windows * seq_len)
    times = float(blocks) * (len(inputs) if spec.true_sequential and needs - {"fisher"} else 1)
    widths = [together[0].shape[1] for together in inputs]
    squares = ("second_moment" in needs) + ("cross_moment" in needs)
    units = [few for together in inputs for few in _units(spec, together)]
    held = (
        tuple((solving_cost(few), _record_bytes(spec, few)) for few in units) if methods(spec.name)[spec.method].scope == "matrix" else ()
    )
    return (
        *(Exchange("moments", "sum", float(width) ** 2, 4, slots, blocks) for width in widths for _ in range(squares)),
        Exchange("tokens of each slot", "gathered", units=slots, times=times),
        Exchange("samples", "gathered", times=times, held=((1.0, sum(4.0 * rows * width for width in widths) * blocks / times),)),
        *(
            (Exchange("records", "gathered", times=times, held=tuple((cost, count * blocks / times) for cost, count in held)),)
            if held
            else ()
        ),
        Exchange("what was written", "broadcast", times=blocks + 1.0),
        Exchange("whether to keep hidden states", "broadcast", times=blocks - 1.0),
        Exchange("whether to stop", "agreed", times=blocks),
        Exchange("beginning and end", "broadcast", times=2.0),
    )


def _record_bytes(spec: StageSpec, sites: list[Site]) -> float:
    """Of new records, about: of a pruned matrix its numbers and its mask, of a rounded one its codes."""
    bits = {"prune": 33.0, "decompose": 8.0}.get(spec.name) or float(getattr(spec.config, "bits", None) or 4) + 0.5
    return sum(site.shape[0] * site.shape[1] * bits / 8 for site in sites)


def _scores_sent(hidden: float, windows: int, teacher: bool) -> tuple[Exchange, ...]:
    """Whether numbers are finite, and scores; of the baseline its last hidden states, batch by batch to rank 0."""
    scores = Exchange("scores", "gathered", 24.0 * windows), Exchange("what was not finite", "gathered")
    return scores if teacher else (*scores, Exchange("hidden states", "streamed", hidden))
