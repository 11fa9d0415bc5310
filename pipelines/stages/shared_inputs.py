"""Matrices that read one input, solved together where their method asks for it, spread over the ranks by what they cost. Knows who shares
statistics; the maths is the method's."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...compress.statistics import InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..errors import InputError
from ..models.structure import Site
from .matrices import Stage, checked_target, current, described, solve

Solved = tuple[dict[str, StoredWeight], dict[str, dict[str, Any]]]
"""By site: the record, and its row of the report."""


def solve_all(stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]) -> Solved:
    """(records, their rows of the report) of sites whose inputs are known, on every rank."""
    ranks, units = stage.context.ranks, _together(stage, sites, statistics)
    owners = spread([solving_cost(few) for few in units], ranks.size)
    mine: dict[int, Solved] = {}
    for unit, few in enumerate(units):
        if owners[unit] == ranks.rank:
            records, layers = _solve_one(stage, few[0], statistics) if len(few) == 1 else _solve_few(stage, few, statistics)
            mine[unit] = (records if ranks.size == 1 else {name: record.to("cpu") for name, record in records.items()}), layers
    result = ranks.in_order(mine).values()
    return {n: r for records, _ in result for n, r in records.items()}, {n: row for _, layers in result for n, row in layers.items()}


def solving_cost(sites: Sequence[Site]) -> float:
    """In products of a column sweep; the factor of the input's second moment counts once."""
    columns = sites[0].shape[1]
    return float(sum(site.shape[0] for site in sites) + columns) * columns**2


def spread(costs: Sequence[float], size: int) -> list[int]:
    """The rank of each unit: the dearest first, each to the rank that has least to do, the first of several."""
    load, owners = [0.0] * size, [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        owners[unit] = load.index(min(load))
        load[owners[unit]] += costs[unit]
    return owners


def _solve_one(stage: Stage, site: Site, statistics: Mapping[str, InputStatistics]) -> Solved:
    record, row = solve(stage, site, statistics)
    return {site.name: record}, {site.name: row}


def _together(stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]) -> list[list[Site]]:
    """Those that read one input with one and the same config, where their method solves several at once and the config does not say
    `shared: false`; else one site each."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        config = stage.config_for(site)
        shares = stage.row.together is not None and getattr(config, "shared", True)
        groups.setdefault((id(statistics[site.name]), config) if shares else site.name, []).append(site)
    return list(groups.values())


def _solve_few(stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]) -> Solved:
    assert stage.row.together is not None
    config = stage.config_for(sites[0])
    targets = {s.name: checked_target(stage, s, config) for s in sites}
    weights = {s.name: current(stage, s).to(stage.context.device) for s in sites}
    known = {s.name: LayerStatistics(statistics[s.name], stage.fisher.get(s.name)) for s in sites}
    try:
        records, metrics = stage.row.together(weights, targets, known, config)
    except ValueError as error:
        one = any(str(error).startswith(f"{name}: ") for name in targets)
        raise InputError(str(error) if one else f"{', '.join(targets)}: {error}") from error
    return records, {s.name: described(s, records[s.name], targets[s.name], statistics[s.name].samples_TI, metrics[s.name]) for s in sites}
