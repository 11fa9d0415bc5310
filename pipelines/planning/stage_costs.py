"""Predicted costs of stages that run block by block: work, and the peak bytes on the device and on the host.

Knows the order in which `stages/compress`, `perplexity` and `stages/fuse` do things; what a matrix costs is `solver_costs`, what a block's own
code does between its products `anatomy`. Recovery is in `recovery_costs`. Reads no weights.
Legend: N windows, T tokens, O out, I in, D model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...compress.statistics import BY_MATRIX, SAMPLES
from ..devices.rates import Work
from ..evaluation.perplexity import LOGITS_AT_ONCE, TOKENS_AT_ONCE
from ..models.sizes import guided_groups, rounded_to_nearest
from ..models.structure import Site, is_tied
from ..ranks.exchange import SLOTS
from ..recipes.stage_settings import StageSpec, methods
from ..stages.shared_inputs import row_parts, solving_cost
from .block_costs import smoothed, trained
from .cost_plan import DENSE, OPENED, CostPlan, Needs
from .division import SLOTS_OF_TEXT, Divided, Exchange, Piece, in_turn
from .solver_costs import Cost, factor_work, solver_cost

F32 = torch.float32
RUNNING_BYTES = 20e6
"""Of host memory once products run: what kernels prepare and an allocator keeps, measured on models of 2 and 4 blocks."""
READ_AHEAD = 2
"""Blocks of an artifact that lie in host memory: the one that is computed on, and the next."""
LOGIT_COPIES = 6
"""Of a span's logits in float32 while they are scored against the teacher's."""


def evaluated(plan: CostPlan, windows: int, records: bool, teacher: bool) -> Needs:
    """An artifact scored on all texts, of so many windows each: every one through every block, then through the head, along with the teacher's
    states."""
    anatomy, seq_len, texts = plan.anatomy, plan.recipe.evaluation.seq_len, 1 + len(plan.recipe.evaluation.also)
    tokens, models = float(texts * windows * seq_len), 2 if teacher else 1
    work = (plan.pass_of(tokens, seq_len) + plan.loaded(records)) * anatomy.blocks
    logits = tokens * anatomy.vocabulary
    scored = Work(
        {plan.dtype: models * logits * anatomy.width}, passes=logits * 4.0 * (26 if teacher else 12), calls=tokens / LOGITS_AT_ONCE * 60
    )
    work += scored
    work += OPENED
    shared = in_turn("evaluation batches", plan.pass_of(tokens, seq_len) * anatomy.blocks + scored, plan.batches(windows, seq_len) * texts)
    alone = {"loading": plan.loaded(records) * anatomy.blocks, "opening": OPENED}
    hidden = plan.hidden_bytes(tokens)
    span = min(LOGITS_AT_ONCE, seq_len) * anatomy.vocabulary * 4.0 * (LOGIT_COPIES if teacher else LOGIT_COPIES / 2)
    walking = plan.block_bytes + plan.running_bytes(windows, seq_len)
    device = plan.outside_bytes * models + max(walking, span)
    host = max(anatomy.outside, READ_AHEAD * anatomy.block_parameters) * plan.element
    return Needs(work, device, host, hidden, (shared,), alone, _scores_sent(anatomy.blocks, texts, hidden, windows, teacher))


def compressed(plan: CostPlan, spec: StageSpec, records: bool, first: bool, written: float) -> Needs:
    """A prune, quantize or decompose stage. `records`: its parent holds some; `first`: its parent is the baseline; `written`: bytes of
    the artifact it leaves."""
    anatomy, row = plan.anatomy, methods(spec.name)[spec.method]
    sites = [s for s in anatomy.sites() if not spec.skips(s.name)]
    needs = frozenset[str]().union(*(row.needs(spec.config_for(s.name)) for s in sites)) if sites else frozenset()
    looks = bool(needs - BY_MATRIX) or row.scope == "block"
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
    last = [] if row.scope == "block" or not sites else anatomy.inputs(sites)[-1]
    sequential = spec.true_sequential and looks and bool(last)
    replayed = sequential and not (row.inputs == "dense" and twin)
    passes += (len(anatomy.inputs(sites)) - 1) * (("cross_moment" in needs) + (not replayed)) if sequential else 0
    replays = 0.0
    if replayed:  # each matrix multiplies once, the last one too
        replays = tokens * plan.itemsize * (anatomy.width + last[0].shape[1])
        passes, last = passes - 1.0, []
    loading = plan.loaded(records) * (2 if twin else 1)
    running = plan.pass_of(tokens, seq_len) * passes
    work += running + loading
    unneeded, read_back = Work({plan.dtype: -tokens * anatomy.products(last)}), Work(passes=anatomy.block_parameters * 4 * DENSE)
    work += unneeded + read_back
    gathered = gathering(plan, anatomy.inputs(sites), needs, tokens) + _weighing(spec, sites, tokens)
    work += gathered
    models = 2 if twin else 1
    hidden = plan.hidden_bytes(tokens) * (models + row.dense_outputs)
    held = plan.outside_bytes * models + plan.block_bytes * models
    alone = {"writing": writing, "loading": loading + read_back}
    shared = [in_turn(SLOTS_OF_TEXT, (running + unneeded + gathered) * anatomy.blocks, plan.slots(windows, seq_len)), pieces]
    sent = _sums_sent(plan, spec, sites, needs, windows, seq_len)
    if row.scope == "block" and hasattr(spec.config, "steps"):
        training = trained(plan, spec, sites)
        work, held = work + training.work, held + kept
        solving = replace(solving, peak=max(solving.peak, training.peak))
        alone["rounding and moving what trains"] = training.repeated
        shared += training.divided(anatomy.blocks, plan.slots(windows, seq_len))
        sent += training.sent(anatomy.blocks)
    device = held + max(solving.peak, plan.running_bytes(windows, seq_len) + 2 * _guided_bytes(spec, sites))
    read = anatomy.block_parameters * plan.element * (1 if first else 2)
    opening = OPENED * (2 if twin else 1)
    weights = 4.0 * tokens * sum(guided_groups(spec, s) for s in sites) * anatomy.blocks
    whole = Needs(
        work * anatomy.blocks + opening,
        device,
        max(anatomy.outside * plan.element, READ_AHEAD * read) + written / anatomy.blocks + weights + RUNNING_BYTES,
        hidden,
        tuple(shared),
        {name: each * anatomy.blocks for name, each in alone.items()} | {"opening": opening},
        sent,
        replayed=replays,
    )
    return _with_outside_blocks(plan, spec, whole)


def _with_outside_blocks(plan: CostPlan, spec: StageSpec, needs: Needs) -> Needs:
    """The head and the embeddings, where they are compressed: one matrix at a time, whole."""
    anatomy = plan.anatomy
    heads = [anatomy.head] if spec.include_head and anatomy.head is not None else []
    for site in heads:
        cost = solver_cost(spec.name, spec.method, spec.config_for(site.name), site.shape, True)
        factor, costs = factor_work(site.shape[1]) if cost.kept else Work(), _parts(spec, [[site]])[0]
        rows = Divided("rows of the head", tuple(Piece(cost.work * (1 / len(costs)), each, 0) for each in costs), 1.0, {0: factor}, True)
        device = plan.outside_bytes + 4.0 * site.shape[0] * site.shape[1] + cost.peak
        needs = needs.most(Needs(cost.work + factor, device, needs.host, 0.0, (rows,), {}, _records_sent(spec, [[site]], 1.0, 1.0)))
    nearest = rounded_to_nearest(spec, anatomy.structure, is_tied(anatomy.model, anatomy.structure))
    for key, site in nearest.items():
        cost = solver_cost("quantize", "rtn", spec.embedding_config(site.shape[1], getattr(spec, key)), site.shape, False)
        needs = needs.most(Needs(cost.work, plan.outside_bytes + 4.0 * site.shape[0] * site.shape[1] + cost.peak, needs.host))
    return needs


def gathering(plan: CostPlan, inputs: list[list[Site]], needs: frozenset[str], tokens: float) -> Work:
    """Gathering what methods want to know of every input."""
    work = Work()
    for group in inputs:
        width, reach = group[0].shape[1], tokens * (plan.anatomy.active if group[0].expert is not None else 1.0)
        squares = (0.6 if "second_moment" in needs else 0.0) + (1.0 if "cross_moment" in needs else 0.0)
        work += Work({F32: squares * reach * width**2}, passes=reach * width * 12.0, calls=reach / TOKENS_AT_ONCE * (4 + width / 256))
    return work


def _weighing(spec: StageSpec, sites: Sequence[Site], tokens: float) -> Work:
    """The inputs under the weights of every group (stages/guidance)."""
    work = Work()
    for site, groups in ((s, guided_groups(spec, s)) for s in sites):
        width = site.shape[1]
        calls = tokens / TOKENS_AT_ONCE * (5 + width / 256)
        work += Work({F32: 0.6 * tokens * width**2}, passes=tokens * width * 12.0, calls=calls) * groups
    return work


def _guided_bytes(spec: StageSpec, sites: Sequence[Site]) -> float:
    return sum(4.0 * groups * site.shape[1] ** 2 for site, groups in ((s, guided_groups(spec, s)) for s in sites))


def _solved(
    plan: CostPlan, spec: StageSpec, sites: list[Site], needs: frozenset[str], records: bool, tokens: float
) -> tuple[Cost, float, Divided]:
    """(work of a block's matrices and the peak bytes in addition to the block, bytes of the statistics that all of them keep, the same work in
    pieces that owners solve)."""
    squares = 4.0 * (("second_moment" in needs) + ("cross_moment" in needs))
    kept, work, peak = _guided_bytes(spec, sites), Work(), 0.0
    pieces, first = list[Piece](), dict[int, Work]()
    solved = list[tuple[Work, list[Site], int]]()
    for number, group in enumerate(plan.anatomy.inputs(sites)):
        width = group[0].shape[1]
        kept += squares * width**2 + 4.0 * SAMPLES * width
        factor, solving = 0.0, dict[str, Work]()
        for site in group:
            cost = _of_matrix(spec, site, records)
            rows, columns = site.shape
            solving[site.name] = cost.work + Work({F32: 2.0 * rows * columns * SAMPLES}, passes=4.0 * rows * columns * (2 * DENSE + 10), calls=100)
            work += solving[site.name]
            measured = 4.0 * rows * (2 * columns + SAMPLES)
            peak = max(peak, kept + 4.0 * rows * columns * 1.5 + max(cost.peak, measured))
            factor = max(factor, cost.kept)
        for config, rows in _stacks(spec, group).items():
            cost = solver_cost(spec.name, spec.method, config, (rows, width), records)
            peak = max(peak, kept + 4.0 * rows * width * 1.5 + cost.peak)
        first[number] = factor_work(width) if factor else Work()
        work += first[number]
        kept += factor
        for few in _units(spec, group):
            solved.append((sum((solving[site.name] for site in few), Work()), few, number))
    for (own, _, number), costs in zip(solved, _parts(spec, [few for _, few, _ in solved]), strict=True):
        pieces += [Piece(own * (1 / len(costs)), cost, number) for cost in costs]
    return Cost(work, max(peak, kept)), kept, Divided("matrices of a block", tuple(pieces), plan.anatomy.blocks, first, by_cost=True)


def _units(spec: StageSpec, group: list[Site]) -> list[list[Site]]:
    """Of the sites of one input, those that one rank solves: all that a method solves at once (stages/shared_inputs), else each."""
    row, out = methods(spec.name)[spec.method], dict[object, list[Site]]()
    if row.scope == "block" and not row.dense_outputs:
        return [group]
    for site in group:
        config = spec.config_for(site.name)
        out.setdefault(config if row.solve_group is not None and getattr(config, "shared", True) else site.name, []).append(site)
    return list(out.values())


def _parts(spec: StageSpec, units: list[list[Site]]) -> list[list[float]]:
    """What the parts of every unit cost (stages/shared_inputs)."""
    row = methods(spec.name)[spec.method]
    if row.scope == "block":
        return [[solving_cost(few)] for few in units]
    return row_parts(units, [row.by_rows(spec.config_for(few[0].name)) for few in units])


def _records_sent(spec: StageSpec, units: list[list[Site]], times: float, share: float) -> tuple[Exchange, ...]:
    """New records, of which owners have a `share` of all at a time: whole units in one exchange, and those of which ranks have parts."""
    whole, parts = list[tuple[float, float]](), list[Exchange]()
    for few, costs in zip(units, _parts(spec, units), strict=True):
        each = _record_bytes(spec, few) * share
        if len(costs) == 1:
            whole.append((costs[0], each))
        else:
            parts.append(Exchange("rows of a matrix", "gathered", times=times, held=tuple((cost, each / len(costs)) for cost in costs)))
    return Exchange("records", "gathered", 1.0, times=times, held=tuple(whole)), *parts


def _stacks(spec: StageSpec, group: list[Site]) -> dict[object, int]:
    """Config → rows of the matrices of one input that a method solves at once (stages/shared_inputs)."""
    row, out = methods(spec.name)[spec.method], dict[object, int]()
    for site in group:
        config = spec.config_for(site.name)
        if row.solve_group is not None and getattr(config, "shared", True):
            out[config] = out.get(config, 0) + site.shape[0]
    return out


def _of_matrix(spec: StageSpec, site: Site, records: bool) -> Cost:
    config, row = spec.config_for(site.name), methods(spec.name)[spec.method]
    if row.scope != "block":
        return solver_cost(spec.name, spec.method, config, site.shape, records)
    if not hasattr(config, "start"):
        return smoothed(config, site, records)
    method = {"gptq": "gptq", "rtn": "rtn", "stored": "rtn"}[config.start]
    return solver_cost("quantize", method, config, site.shape, records)


def _sums_sent(
    plan: CostPlan, spec: StageSpec, sites: list[Site], needs: frozenset[str], windows: int, seq_len: int
) -> tuple[Exchange, ...]:
    """What ranks exchange about a stage's blocks (models/slot_sums, stages/shared_inputs, store/artifact)."""
    blocks, inputs = plan.anatomy.blocks, plan.anatomy.inputs(sites)
    slots = min(SLOTS, len(plan.batches(windows, seq_len)))
    rows = min(SAMPLES, windows * seq_len)
    times = float(blocks) * (len(inputs) if spec.true_sequential and needs - BY_MATRIX else 1)
    widths = [group[0].shape[1] for group in inputs]
    squares = ("second_moment" in needs) + ("cross_moment" in needs)
    units = [few for group in inputs for few in _units(spec, group)]
    return (
        *(Exchange("moments", "sum", float(width) ** 2, 4, slots, blocks) for width in widths for _ in range(squares)),
        *(
            Exchange("guided moments", "sum", float(site.shape[1]) ** 2, 4, slots, blocks)
            for site, groups in ((s, guided_groups(spec, s)) for s in sites)
            for _ in range(groups)
        ),
        Exchange("tokens of each slot", "gathered", units=slots, times=times),
        Exchange("samples", "gathered", times=times, held=((1.0, sum(4.0 * rows * width for width in widths) * blocks / times),)),
        *_records_sent(spec, units, times, blocks / times),
        Exchange("what was written", "broadcast", times=blocks + 1.0),
        Exchange("whether to keep hidden states", "broadcast", times=blocks - 1.0),
        Exchange("whether to stop", "agreed", times=blocks),
        Exchange("beginning and end", "broadcast", times=2.0),
    )


def _record_bytes(spec: StageSpec, sites: list[Site]) -> float:
    """Of new records, about: of a pruned matrix its numbers and its mask, of a rounded one its codes."""
    bits = {"prune": 33.0, "decompose": 8.0}.get(spec.name) or float(getattr(spec.config, "bits", None) or 4) + 0.5
    return sum(site.shape[0] * site.shape[1] * bits / 8 for site in sites)


def _scores_sent(blocks: int, texts: int, hidden: float, windows: int, teacher: bool) -> tuple[Exchange, ...]:
    """Whether to begin or keep hidden states; of every text whether numbers are finite, and scores; of the baseline its last hidden states, batch by
    batch to rank 0."""
    sent = (
        Exchange("whether to keep hidden states", "broadcast", times=blocks + 1.0),
        Exchange("scores", "gathered", 24.0 * windows, times=texts),
        Exchange("what was not finite", "gathered", times=texts),
    )
    return sent if teacher else (*sent, Exchange("hidden states", "streamed", hidden))
