"""Solves matrices on the ranks: those of one input jointly where their method does so, distributed by cost; the most expensive by parts of
their rows. Knows which matrices share statistics; the maths is the method's."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ...compress.block import BlockShare
from ...compress.feedback import part_rows
from ...compress.statistics import InputStatistics
from ...compress.weights import StoredWeight
from ..errors import InputError
from ..models.structure import Site
from ..ranks.exchange import SLOTS
from .matrices import Stage, checked_target, current, described, solve

Solved = tuple[dict[str, StoredWeight], dict[str, dict[str, object]]]
"""By site: the record, and its row of the report."""


def solve_all(stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]) -> Solved:
    """(records, rows of the report) of sites whose inputs are known, on every rank."""
    ranks, units = stage.context.ranks, _groups(stage, sites, statistics)
    parts = row_parts(units, [stage.row.by_rows(stage.config_for(few[0])) for few in units])
    owners = iter(spread([cost for costs in parts for cost in costs], ranks.size))
    owned = [[next(owners) for _ in costs] for costs in parts]
    mine, shared = dict[int, Solved](), dict[int, Solved]()
    for unit, few in enumerate(units):
        if owned[unit] == [ranks.rank]:
            records, layers = _solve_one(stage, few[0], statistics) if len(few) == 1 else _solve_few(stage, few, statistics)
            mine[unit] = (records if ranks.size == 1 else {name: record.to("cpu") for name, record in records.items()}), layers
    for unit, few in enumerate(units):  # behind its own, so that nobody waits for a rank that has others to solve
        if len(owned[unit]) > 1:
            share = BlockShare((), ranks.rank, ranks.size, ranks.gathered, spread=lambda costs, of_unit=owned[unit]: of_unit)
            shared[unit] = _solve_few(stage, few, statistics, {"share": share})
    solved = [solved for _, solved in sorted((shared | ranks.in_order(mine)).items())]
    return {n: r for records, _ in solved for n, r in records.items()}, {n: layer for _, layers in solved for n, layer in layers.items()}


def row_parts(units: Sequence[Sequence[Site]], by_rows: Sequence[bool]) -> list[list[float]]:
    """Of every unit what its parts cost: one, or where its method solves rows apart several parts of a unit that costs more than its share of
    all. How many ranks there are is of no consequence: a part's bits may be others than a whole's."""
    costs, parts = [solving_cost(few) for few in units], list[list[float]]()
    for few, apart, cost in zip(units, by_rows, costs, strict=True):
        rows, columns = sum(site.shape[0] for site in few), few[0].shape[1]
        height = part_rows(rows)
        heights = [min(height, rows - start) for start in range(0, rows, height)] if apart and cost * SLOTS > sum(costs) else [rows]
        parts.append([float(some + columns) * columns**2 for some in heights])
    return parts


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
    record, layer = solve(stage, site, statistics)
    return {site.name: record}, {site.name: layer}


def _groups(stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]) -> list[list[Site]]:
    """Those that read one input with one and the same config, where their method solves several at once and the config does not say
    `shared: false`; else one site each."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        config = stage.config_for(site)
        joint = stage.row.solve_group is not None and getattr(config, "shared", True)
        groups.setdefault((id(statistics[site.name]), config) if joint else site.name, []).append(site)
    return list(groups.values())


def _solve_few(
    stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics], shared: Mapping[str, BlockShare] = MappingProxyType({})
) -> Solved:
    assert stage.row.solve_group is not None
    config = stage.config_for(sites[0])
    targets = {s.name: checked_target(stage, s, config) for s in sites}
    weights = {s.name: current(stage, s).to(stage.context.device) for s in sites}
    known = {s.name: stage.known(s, statistics) for s in sites}
    try:
        records, metrics = stage.row.solve_group(weights, targets, known, config, **shared)
    except ValueError as error:
        one = any(str(error).startswith(f"{name}: ") for name in targets)
        raise InputError(str(error) if one else f"{', '.join(targets)}: {error}") from error
    return records, {s.name: described(s, records[s.name], targets[s.name], statistics[s.name].samples_TI, metrics[s.name]) for s in sites}
