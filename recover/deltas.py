"""Methods that move few weights: PaFi, FishMask (FishDip's re-estimation as a swap of those that moved least) and diff pruning.

What they learn is a sparse delta: added to dense weights, stored next to quantized ones. Legend: O out, I in, N moved weights.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from ..compress.ranges import Count, FactorOrZero, ReadWhere, ShareOrAll, SomeOrAll, StepsOrZero
from ..compress.weights import SparseDelta, StoredWeight
from .adapters import takes_dense
from .compressed_linear import CompressedLinear, SparseValues, merge_delta
from .criteria import By, Criterion, Quota, Selection, choose, fisher_diagonal, select
from .site import AttachSite
from .trainable import Attached, Trainable, through
from .training_run import TrainConfig

_PARTS = ReadWhere("by is weight or channel", lambda config: config.by != "layer")
_FISHER = ReadWhere(
    "criterion is fisher or saliency, or reestimate_every is above 0",
    lambda config: config.criterion != "magnitude" or config.reestimate_every > 0,
)


@dataclass(frozen=True)
class Pafi(TrainConfig):
    """`share` of the weights, the smallest |w| among the kept ones (arXiv:2305.16742); no data needed."""

    share: SomeOrAll = 0.005
    quota: Annotated[Quota, _PARTS] = "global"
    by: By = "weight"


@dataclass(frozen=True)
class FishMask(TrainConfig):
    """FishMask, and FishDip as a swap: every `reestimate_every` steps (0: never) the `swap` share of each matrix' positions that moved least
    gives way to the most informative others. FishDip itself chooses all positions anew, by the Fisher information of the samples with the
    highest loss."""

    share: SomeOrAll = 0.005
    samples: Annotated[Count, _FISHER] = 128
    criterion: Criterion = "fisher"
    quota: Annotated[Quota, _PARTS] = "global"
    by: By = "weight"
    reestimate_every: StepsOrZero = 0
    swap: Annotated[SomeOrAll, ReadWhere("reestimate_every is above 0", lambda config: config.reestimate_every > 0)] = 0.3


@dataclass(frozen=True)
class DiffPruning(TrainConfig):
    """Hard-concrete gates (l, r) = (−1.5, 1.5), α₀ = 5 for `gated` of the steps, then the `share` with the largest |z·w| is fixed and
    tuned (arXiv:2012.07463). structured: one more gate per output row."""

    share: SomeOrAll = 0.005
    structured: bool = False
    gated: ShareOrAll = 0.5
    penalty: Annotated[FactorOrZero, ReadWhere("gated is above 0", lambda config: config.gated > 0)] = 1.0


def pafi(site: AttachSite, config: Pafi) -> Attached:
    return _moved(site, select(site, Selection("magnitude", config.share, config.quota, config.by)))


def fish_mask(site: AttachSite, config: FishMask) -> Attached:
    attached = _moved(site, select(site, Selection(config.criterion, config.share, config.quota, config.by, config.samples)))
    if config.reestimate_every:
        _re_estimate(site, config, attached)
    return attached


def _moved(site: AttachSite, index: dict[str, Tensor]) -> Attached:
    out: dict[str, Trainable] = {}
    for name, positions in index.items():
        linear = site.linears[name]
        out[f"{name}.sparse"] = move(linear, positions)
    return Attached(out)


def move(linear: CompressedLinear, index_N: Tensor) -> Trainable:
    """Let the weights at flat positions move; a delta the record has already is taken along."""
    stored, merges = linear.stored, takes_delta(linear.stored)
    if stored.delta is not None:
        index_N = torch.cat((stored.delta.index.long(), index_N)).unique()
    storage = torch.float32 if merges else torch.float16
    sparse = SparseValues(index_N, torch.zeros(len(index_N), device=index_N.device), storage)
    if stored.delta is not None:
        sparse.values.data[torch.searchsorted(index_N, stored.delta.index.long())] = stored.delta.values.float()
    sparse.merges, linear.sparse = merges, sparse
    sparse.values.requires_grad_(True)
    return Trainable(sparse.values, "sparse", through(storage))


def takes_delta(stored: StoredWeight) -> bool:
    """A delta on kept weights may be added to a dense base, masked or not; the raw input must be the base's."""
    return stored.delta is None and takes_dense(stored.with_mask(None))


def _re_estimate(site: AttachSite, config: FishMask, attached: Attached) -> None:
    def before_step(step: int) -> dict[str, Tensor]:
        if step == 0 or step % config.reestimate_every:
            return {}
        assert site.gradients is not None
        chosen = {name: linear for name, linear in site.linears.items() if f"{name}.sparse" in attached.trainables}
        fisher = fisher_diagonal(chosen, site.gradients, config.samples, first_batch=step)
        return {f"{name}.sparse": swap_(linear, fisher[name], config.swap) for name, linear in chosen.items()}

    attached.before_step = before_step
    attached.buffers = lambda: {f"{n}.index": lin.sparse.index for n, lin in site.linears.items() if lin.sparse is not None}


@torch.no_grad()
def swap_(linear: CompressedLinear, fisher_OI: Tensor, share: float) -> Tensor:
    """Replace the `share` of positions that moved least by the most informative kept ones not yet moved; the replaced weights return to
    their start. Returns bool [N], True where a position is new."""
    sparse, mask = linear.sparse, linear.stored.mask_OI()
    assert sparse is not None
    score = fisher_OI.reshape(-1).clone()
    if mask is not None:
        score.masked_fill_(~mask.view(-1), -torch.inf)
    score[sparse.index] = -torch.inf
    count = min(int(share * len(sparse.index)), int((score > -torch.inf).sum()))
    fresh = torch.zeros(len(sparse.index), dtype=torch.bool, device=score.device)
    if count:
        least = sparse.values.abs().topk(count, largest=False).indices
        sparse.index[least], sparse.values.data[least] = score.topk(count).indices, 0
        fresh[least] = True
    return fresh


class DiffGates(nn.Module):
    """W + z ⊙ w with hard-concrete z, then, after the cut, W + m ⊙ w with the fixed mask m. Noise comes from (seed, step, name)."""

    needs_base = True
    cut: Tensor
    is_cut: Tensor

    def __init__(self, linear: CompressedLinear, name: str, site: AttachSite, structured: bool) -> None:
        super().__init__()
        base = linear.base()
        self.stored, self.name, self.site, self.step, self.noisy = linear.stored, name, site, 0, False
        self.moved = nn.Parameter(torch.zeros_like(base, dtype=torch.float32))
        self.gate = nn.Parameter(torch.full_like(base, 5.0, dtype=torch.float32))
        self.row_gate = nn.Parameter(torch.full((base.shape[0], 1), 5.0, device=base.device)) if structured else None
        self.register_buffer("cut", torch.zeros(base.shape, dtype=torch.bool, device=base.device))
        self.register_buffer("is_cut", torch.zeros(1, dtype=torch.bool))
        self.preview: Tensor | None = None

    def weights(self, base_OI: Tensor, moved_OI: Tensor, gate_OI: Tensor, row_gate_O1: Tensor | None = None) -> Tensor:
        chosen = self.cut if self.fixed else self.preview
        z = torch.ones_like(moved_OI) if self.fixed else self._open(gate_OI, row_gate_O1)
        if chosen is not None:
            z = z * chosen
        mask = self.stored.mask_OI()
        if mask is not None:
            z = z * mask
        return base_OI + (z * moved_OI).to(base_OI.dtype)

    @property
    def fixed(self) -> bool:
        return bool(self.is_cut)

    def _open(self, gate_OI: Tensor, row_gate_O1: Tensor | None) -> Tensor:
        generator = self.site.generator(self.name, self.step + 1)
        z = _hard_concrete(gate_OI, generator if self.noisy else None)
        return z if row_gate_O1 is None else z * _hard_concrete(row_gate_O1, generator if self.noisy else None)

    @torch.no_grad()
    def moves(self) -> Tensor:
        """z ⊙ w without noise, float32 [O, I]."""
        z = torch.ones_like(self.moved) if self.fixed else _hard_concrete(self.gate, None)
        if self.row_gate is not None and not self.fixed:
            z = z * _hard_concrete(self.row_gate, None)
        return z * self.moved

    def expected_gates(self) -> Tensor:
        """Expected number of open gates: Σ σ(α − log(−l/r)) with −l/r = 1."""
        count = torch.sigmoid(self.gate).sum()
        return count if self.row_gate is None else count + torch.sigmoid(self.row_gate).sum() * self.gate.shape[1]

    def fold(self, stored: StoredWeight) -> StoredWeight:
        chosen = self.cut if self.fixed else self.preview
        moves = self.moves() if chosen is None else self.moves() * chosen
        mask = stored.mask_OI()
        index = (moves if mask is None else moves * mask).view(-1).nonzero().squeeze(-1)
        if not len(index):
            return stored
        merges, values = takes_delta(stored), moves.view(-1)[index]
        if stored.smooth is not None:
            values = values / stored.smooth.float()[index % stored.shape[1]]
        delta = SparseDelta(index.to(torch.int32), values.to(torch.float32 if merges else torch.float16))
        return merge_delta(stored, delta) if merges else add_delta(stored, delta)

    def trainables(self) -> dict[str, Trainable]:
        storage = torch.float32 if takes_delta(self.stored) else torch.float16
        out = {"moved": Trainable(self.moved, "sparse", through(storage)), "gate": Trainable(self.gate, "gates")}
        return out if self.row_gate is None else out | {"row_gate": Trainable(self.row_gate, "gates")}


def add_delta(stored: StoredWeight, delta: SparseDelta) -> StoredWeight:
    """The record with one more sparse delta; positions may be in both."""
    if stored.delta is None:
        return replace(stored, delta=delta)
    index = torch.cat((stored.delta.index.long(), delta.index.long())).unique()
    values = torch.zeros(len(index), device=index.device)
    for part in (stored.delta, delta):
        values[torch.searchsorted(index, part.index.long())] += part.values.float()
    return replace(stored, delta=SparseDelta(index.to(torch.int32), values.to(stored.delta.values.dtype)))


def _hard_concrete(alpha: Tensor, generator: torch.Generator | None, low: float = -1.5, high: float = 1.5) -> Tensor:
    """Gate in [0, 1]; with a generator a sample, without the value at the mean (eq. 4 and 5)."""
    if generator is not None:
        u = torch.rand(alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(alpha.device)
        alpha = alpha + u.log() - (1 - u).log()
    return (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1)


def diff_pruning(site: AttachSite, config: DiffPruning) -> Attached:
    gates, out = {}, {}
    for name, linear in site.linears.items():
        gates[name] = DiffGates(linear, name, site, config.structured)
        linear.reweight = gates[name]
        out |= {f"{name}.{key}": t for key, t in gates[name].trainables().items()}
    total = sum(g.moved.numel() for g in gates.values())
    cut_at = math.ceil(config.gated * site.steps)

    def chosen() -> dict[str, Tensor]:
        scores = {name: g.moves().abs() for name, g in gates.items()}
        result = choose(scores, {name: lin.stored.mask_OI() for name, lin in site.linears.items()}, config.share)
        masks = {name: torch.zeros(g.moved.numel(), dtype=torch.bool, device=g.moved.device) for name, g in gates.items()}
        for name, index in result.items():
            masks[name][index] = True
        return {name: mask.view(gates[name].moved.shape) for name, mask in masks.items()}

    def before_step(step: int) -> None:
        for gate in gates.values():
            gate.step, gate.noisy = step, step < cut_at
        if step >= cut_at and not all(g.fixed for g in gates.values()):
            for name, mask in chosen().items():
                gates[name].moved.data.copy_(gates[name].moves())
                gates[name].cut.copy_(mask)
                gates[name].is_cut.fill_(True)

    def stored_form(on: bool) -> None:
        masks = chosen() if on else {}
        for name, gate in gates.items():
            gate.preview = masks.get(name)
            gate.noisy = False if on else gate.noisy

    def penalty() -> Tensor:
        if all(g.fixed for g in gates.values()):
            return torch.zeros(())
        return config.penalty * sum((g.expected_gates() for g in gates.values()), torch.zeros(())) / total

    def buffers() -> dict[str, Tensor]:
        return {f"{n}.{key}": g.get_buffer(key) for n, g in gates.items() for key in ("cut", "is_cut")}

    return Attached(out, before_step=before_step, buffers=buffers, penalty=penalty, stored_form=stored_form)
