"""Matrices that read one input, solved together where their method asks for it. Knows who shares statistics; the maths is the method's."""

from collections.abc import Mapping
from typing import Any

from ...compress.statistics import InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..errors import InputError
from ..models.structure import Site
from .matrices import Stage, checked_target, current, described, solve


def solve_all(
    stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, Any]]]:
    """(records, what is said of each) of sites whose inputs are known."""
    records: dict[str, StoredWeight] = {}
    layers: dict[str, dict[str, Any]] = {}
    for few in _together(stage, sites, statistics):
        if len(few) == 1:
            records[few[0].name], layers[few[0].name] = solve(stage, few[0], statistics)
        else:
            found, told = _solve_few(stage, few, statistics)
            records, layers = records | found, layers | told
    return records, layers


def _together(stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]) -> list[list[Site]]:
    """Those that read one input with one and the same config, where their method solves several at once and the config does not say
    `shared: false`; else one site each."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        config = stage.config_for(site)
        shares = stage.row.together is not None and getattr(config, "shared", True)
        groups.setdefault((id(statistics[site.name]), config) if shares else site.name, []).append(site)
    return list(groups.values())


def _solve_few(
    stage: Stage, sites: list[Site], statistics: Mapping[str, InputStatistics]
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, Any]]]:
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
