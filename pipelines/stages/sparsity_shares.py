"""Distributes a pruning stage's mean sparsity over the blocks: the maths is `compress/sparsity`, the inputs are the dense model's.

Knows the baseline and the calibration text. The result is kept in the stage's scratch directory, so a resumed stage does not measure again.
"""

from functools import partial
from itertools import islice
from typing import Any

import torch

from ...compress.sparsity import SPREAD, by_depth, by_outliers, outlier_share, whole_columns
from ...compress.statistics import InputStatistics
from ..errors import InputError
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.collecting import gather
from ..models.hidden import Room
from ..models.structure import Site
from ..recipes.stage_settings import StageSpec
from ..store.files import read_json, write_json
from .context import Context, check_stop
from .walked import entering, share_of

SHARED = frozenset({"sparsity", "pattern", "allocation", "spread"})
"""A matrix for which an override sets one of these takes no part: it has a sparsity of its own."""


def shared_sparsity(spec: StageSpec, chosen: list[Site], context: Context) -> dict[str, float]:
    """Site → sparsity, the same for all sites of a block but for the rounding to whole columns, with the stage's own as the mean over all
    their weights. Sites that have a sparsity of their own take no part; empty when the blocks are all alike."""
    config = spec.config
    rule = getattr(config, "allocation", "uniform")
    blocks: dict[int, list[Site]] = {}
    for site in chosen:
        if site.block is not None and not spec.overridden(site.name, SHARED):
            blocks.setdefault(site.block, []).append(site)
    if rule == "uniform" or not blocks:
        return {}
    sizes = [sum(s.shape[0] * s.shape[1] for s in sites) for sites in blocks.values()]
    spread = SPREAD[rule] if config.spread is None else config.spread
    if rule == "depth":
        result = by_depth(len(blocks), config.sparsity, spread, sizes)
    else:
        result = by_outliers(_kept_outlier_shares(spec, blocks, context), config.sparsity, spread, sizes)
    wanted = {site: sparsity for sites, sparsity in zip(blocks.values(), result, strict=True) for site in sites}
    return dict(zip((s.name for s in wanted), whole_columns(list(wanted.values()), [s.shape for s in wanted]), strict=True))


def _kept_outlier_shares(spec: StageSpec, blocks: dict[int, list[Site]], context: Context) -> list[float]:
    path, ranks = context.scratch / "outliers.json", context.ranks
    if not ranks.broadcast(ranks.leads and path.is_file()):
        result = outlier_shares(spec, blocks, context)
        if ranks.leads:
            write_json(path, {"shares": result})
    return ranks.broadcast(read_json(path, f"delete {context.scratch} and run again")["shares"] if ranks.leads else None)


def outlier_shares(spec: StageSpec, blocks: dict[int, list[Site]], context: Context) -> list[float]:
    """Share of outliers among |w|·‖x‖ of each block's matrices (OWL, arXiv:2310.05175): weights and inputs of the dense model."""
    model = StreamedModel(context.baseline, context.device, context.dtype)
    ids_NT, room = context.inputs.calibration(), Room.measured(context.device, context.scratch, context.ranks.size)
    share = share_of(ids_NT, context.ranks)
    hidden = entering(model, ids_NT, room, share)
    shares = []
    with torch.no_grad(), bar(f"{spec.address} {spec.method}: outliers, blocks", len(blocks)) as shown:
        for index in islice(model.walk(), max(blocks) + 1):
            sites, run = blocks.get(index, []), partial(model.run_block, index)
            statistics = gather(model, hidden, sites, frozenset({"norms"}), lambda place, h, run=run: hidden.put(place, run(h)), share)
            if sites:
                shares.append(outlier_share([_weight_and_norms(model, site, statistics) for site in sites]))
                shown.advance()
            check_stop(context)
    return shares


def _weight_and_norms(model: StreamedModel, site: Site, statistics: dict[str, InputStatistics]) -> Any:
    """A site no token reached (an idle expert) has inputs of 0, hence no outliers."""
    weight_OI, result = model.matrix(site), statistics.get(site.name)
    norm_I = torch.zeros(site.shape[1], device=weight_OI.device) if result is None else result.norm_I
    if not bool(torch.isfinite(norm_I).all()):
        raise InputError(f"{site.name}: its inputs hold NaN or Inf; the layer below it overflows, or the checkpoint is damaged")
    return weight_OI, norm_I
