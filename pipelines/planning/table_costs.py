"""Predicted costs of what is computed once per run: self-generated text, Fisher information, gradients of tokens, and the table of errors that a
budget's allocation is chosen from.

Knows the order in which `stages/self_text`, `stages/fisher`, `stages/guidance` and `allocation/error_tables` do things; what a matrix costs is `solver_costs`. Reads no weights.
Legend: N sequences, T tokens, O out, I in, D model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...compress.gptq import GptqConfig
from ...compress.methods import QUANTIZE, Method
from ...compress.options import Grid, Setting, overrides
from ...compress.statistics import BY_MATRIX
from ..allocation.outside_errors import ROWS_AT_ONCE
from ..allocation.spending import Outside, Spent
from ..devices.rates import Work
from ..evaluation.perplexity import LOGITS_AT_ONCE
from ..models.sizes import guided_groups
from ..models.structure import Site
from ..recipes.stage_settings import StageSpec
from ..stages.self_text import AT_ONCE, DOCUMENTS, TOKENS
from .cost_plan import ATTENTION_SHARE, DENSE, OPENED, CostPlan, Needs
from .division import Exchange, in_turn
from .solver_costs import factor_work, factors_work, solver_cost, term_work
from .stage_costs import READ_AHEAD, RUNNING_BYTES, gathering

F32, F64 = torch.float32, torch.float64
SQUARED = 6.0
"""Reads and writes of a weight in float32 while its gradient is squared and summed up by rows and by columns."""


def self_text(plan: CostPlan) -> Needs:
    """The whole dense model, token after token of all documents at once; every number of the vocabulary is read some times to draw one."""
    anatomy = plan.anatomy
    weights = anatomy.in_blocks + anatomy.outside
    steps, drawn = TOKENS * DOCUMENTS // AT_ONCE, 8.0 * 4 * AT_ONCE * anatomy.vocabulary
    step = Work(
        {plan.dtype if plan.element < 4 else F32: float(AT_ONCE * weights)},
        passes=weights * plan.element + drawn,
        calls=60.0 * anatomy.blocks,
    )
    return Needs(step * steps + OPENED * 3, weights * plan.element + drawn, 0.0)


def fisher(plan: CostPlan) -> Needs:
    """Every sequence through all blocks, what enters each kept, and back from the head down, each block computed once more."""
    plan = _of_gradients(plan)
    sites, samples = plan.anatomy.sites(), plan.recipe.calibration.samples
    weights = float(sum(s.shape[0] * s.shape[1] for s in sites))
    squaring = Work({plan.dtype: 3.0 * _tokens(plan) * plan.anatomy.products()})
    squaring += Work(passes=4 * SQUARED * weights, calls=12.0 * len(sites)) * samples
    gradient = max(s.shape[0] * s.shape[1] for s in sites) * (plan.itemsize + 8.0)
    sums = Exchange("Fisher information", "gathered", 8.0 * samples * sum(map(sum, (s.shape for s in sites))), times=plan.anatomy.blocks)
    return _there_and_back(plan, squaring, gradient, 0.0, sums)


def guidance(plan: CostPlan, spec: StageSpec) -> Needs:
    """The same walk for the gradients of a stage's matrices at their outputs, which need none at their weights."""
    plan, blocks = _of_gradients(plan), plan.anatomy.blocks
    sites = [site for site in plan.anatomy.sites() if not spec.skips(site.name)]
    groups = [guided_groups(spec, s) for s in sites]
    guided = [site for site, count in zip(sites, groups, strict=True) if count]
    squaring = Work({plan.dtype: 2.0 * _tokens(plan) * plan.anatomy.products()})
    squaring += Work(
        passes=20.0 * _tokens(plan) * sum(s.shape[0] for s in guided), calls=12.0 * len(guided) * plan.recipe.calibration.samples
    )
    squares = 4.0 * _tokens(plan) * sum(groups) * blocks
    widest = max((site.shape[0] for site in guided), default=0) * plan.recipe.calibration.seq_len * 8.0
    return _there_and_back(plan, squaring, widest, 2 * squares, Exchange("gradients of tokens", "gathered", squares))


def _of_gradients(plan: CostPlan) -> CostPlan:
    return replace(plan, dtype=F32) if plan.dtype == torch.float16 else plan


def _tokens(plan: CostPlan) -> float:
    return float(plan.recipe.calibration.samples * plan.recipe.calibration.seq_len)


def _there_and_back(plan: CostPlan, squaring: Work, extra: float, squares: float, sent: Exchange) -> Needs:
    """`squaring`: a block's work in addition to its own step; `extra`: bytes in addition to its activations; `squares`: of the host, what is gathered."""
    anatomy, samples, seq_len = plan.anatomy, plan.recipe.calibration.samples, plan.recipe.calibration.seq_len
    tokens = _tokens(plan)
    step = anatomy.step(1, seq_len, plan.dtype, False, "cross_entropy")
    attention = 3.5 * ATTENTION_SHARE * tokens * seq_len * anatomy.width
    there = plan.pass_of(tokens, seq_len) + plan.loaded(False)
    back = plan.loaded(False) + step.work * samples + Work({plan.dtype: attention}) + squaring
    logits = tokens * anatomy.vocabulary
    head = Work({plan.dtype: 2 * logits * anatomy.width}, passes=logits * 4.0 * 16, calls=tokens / LOGITS_AT_ONCE * 60)
    acting = plan.block_bytes + 1.4 * step.activations.saved / anatomy.blocks + extra
    span = min(LOGITS_AT_ONCE, seq_len) * anatomy.vocabulary * 4.0 * 3
    host = max(anatomy.outside, READ_AHEAD * anatomy.block_parameters) * plan.element + squares + RUNNING_BYTES
    kept = plan.hidden_bytes(tokens) * (anatomy.blocks + 1)
    loading = plan.loaded(False) * (2 * anatomy.blocks)
    work = (there + back) * anatomy.blocks + head + OPENED
    sequences = in_turn("sequences", work + -1 * (loading + OPENED), [1.0] * samples)
    alone = {"loading": loading, "opening": OPENED}
    return Needs(work, plan.outside_bytes + max(acting, span), host, kept, (sequences,), alone, (sent,))


def table(plan: CostPlan, stages: Spent, settings: Sequence[Setting], records: bool, blocks: int) -> Needs:
    """Every matrix of so many blocks on every grid, its error's spectrum, and what rounding the factors loses. `records`: the artifact before the
    first stage that the budget chooses for holds some."""
    anatomy, seq_len = plan.anatomy, plan.recipe.calibration.seq_len
    tokens = float(plan.recipe.calibration.samples * seq_len)
    sites = stages.sites(anatomy.sites())
    row: Method = QUANTIZE[stages.quantize.method]
    needs = frozenset({"second_moment"}).union(*(row.needs(stages.quantize.config_for(s.name)) for s in sites)) - {
        "cross_moment",
        *BY_MATRIX,
    }
    work = plan.pass_of(tokens, seq_len) * 2.0 + plan.loaded(records) + Work(calls=500)
    work += gathering(plan, anatomy.inputs(sites), needs, tokens)
    kept = peak = 0.0
    for group in anatomy.inputs(sites):
        kept += 4.0 * group[0].shape[1] ** 2
        for site in group:
            result, held = _of_matrix(stages, site, settings, plan.recipe.allocation.errors == "iterates")
            work, peak = work + result, max(peak, kept + held)
        if stages.quantize.method.startswith("gptq") or row.scope == "block":
            work, kept = work + factor_work(group[0].shape[1]), kept + 4.0 * group[0].shape[1] ** 2
    device = plan.outside_bytes + plan.block_bytes + max(peak, kept, plan.running_bytes(plan.recipe.calibration.samples, seq_len))
    read = anatomy.block_parameters * plan.element * (2 if records else 1)
    host = max(anatomy.outside * plan.element, READ_AHEAD * read) + RUNNING_BYTES
    return Needs(work * blocks + OPENED, device, host, plan.hidden_bytes(tokens))


def outside_table(plan: CostPlan, outside: Sequence[Outside]) -> Needs:
    """Of the matrices outside the blocks: rows of a vocabulary rounded and compared, some at once, and the text through the last block once more."""
    calibration = plan.recipe.calibration
    tokens, work, peak = float(calibration.samples * calibration.seq_len), Work(), 0.0
    for each in outside:
        rows, columns = each.site.shape
        span = (min(rows, ROWS_AT_ONCE), columns)
        held = 4.0 * span[0] * columns + (8.0 * (3 * span[0] + 2 * columns) * columns if each.multiplied else 8.0 * span[0] * columns)
        for config in each.configs:
            cost = solver_cost("quantize", "rtn", config, span, False)
            work += cost.work * (rows / span[0]) + Work(passes=4.0 * rows * columns * (DENSE + 20))
            peak = max(peak, held + cost.peak)
        if each.multiplied:
            work += Work({F32: 0.6 * tokens * columns**2, F64: float(len(each.configs) + 1) * rows * columns**2})
    work += plan.pass_of(tokens, calibration.seq_len)
    return Needs(work, plan.outside_bytes + peak, plan.anatomy.outside * plan.element + RUNNING_BYTES, plan.hidden_bytes(tokens))


def _of_matrix(stages: Spent, site: Site, settings: Sequence[Setting], iterates: bool) -> tuple[Work, float]:
    """(work, peak bytes in addition to the statistics) of one matrix under every setting that fits it."""
    rows, columns = site.shape
    fitting = [s for s in settings if s.fits(rows, columns)]
    grids = list(dict.fromkeys(s.grid for s in fitting))
    matrix, square, side = 4.0 * rows * columns, 4.0 * columns**2, min(rows, columns)
    work = Work({F64: 2.0 * rows * columns**2}, passes=matrix * (DENSE + 20), calls=60)
    if rows > columns:
        work += Work({F64: 1.0 * columns**3}, factors=9.0 * columns**3)  # the moment's root, once
    solved = 0.0
    for number, grid in enumerate(grids):
        cost = solver_cost("quantize", *_quantizer(stages, site, grid), site.shape, False)
        solved = max(solved, cost.peak)
        work += cost.work + Work({F64: 2.0 * rows * columns**2}, 9.0 * side**3, matrix * (DENSE + 30), 60)
        for bits in {s.factor_bits for s in fitting if s.grid == grid and s.rank} - {16}:
            if bits == 4 or number == len(grids) // 2:
                ranks = sorted({s.rank for s in fitting if s.rank and s.factor_bits == bits})
                rank = ranks[len(ranks) // 2]
                work += term_work(rows, columns, rank, True) + factors_work(rows, columns, rank, bits, 3)
                work += Work({F64: 3.0 * rows * columns**2}, passes=60 * matrix, calls=100)
    if iterates and stages.decompose is not None:
        for setting in fitting:
            if setting.rank:
                config = replace(stages.decompose.config_for(site.name), rank=setting.rank, factor_bits=setting.factor_bits)
                cost = solver_cost("decompose", stages.decompose.method, config, site.shape, True)
                work, solved = work + cost.work, max(solved, cost.peak)
    spectrum = 8.0 * matrix + (2 if rows <= columns else 6) * square
    return work, 2.0 * matrix + max(solved, spectrum)


def _quantizer(stages: Spent, site: Site, grid: Grid) -> tuple[str, object]:
    """The method and config that make a matrix's codes on a grid: of one that trains whole blocks, what it starts from."""
    name, config = stages.quantize.method, stages.quantize.config_for(site.name)
    if QUANTIZE[name].scope == "block":
        name, config = "gptq", GptqConfig(clip=config.clip)
    wanted: dict[str, object] = overrides(Setting(grid))["quantize"]
    return name, replace(config, **wanted | ({"correction": 0.0} if hasattr(config, "correction") else {}))
