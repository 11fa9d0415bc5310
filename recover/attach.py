"""What each method does to a model: one function a method, from an AttachSite and the method's own config to an Attached.

Virtual tokens are in `prompts`, bottlenecks in `bottlenecks`, sparse deltas in `deltas`, increments on the grid in `increments`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from ..compress.ranges import Factor, ReadWhere, Share, Width, WidthOrZero
from ..compress.weights import GgmlWeight
from .adapters import LoraVariant, Magnitude, MaskedLowRank, PooledPair, Spectrum, prune_ranks, start_factors, takes_dense
from .compressed_model import as_records
from .scales import RelativeScales
from .site import AttachSite, joined, train_biases, train_embeddings, train_factors, train_norms
from .super_scales import SuperScales
from .trainable import Attached, Trainable
from .training_run import TrainConfig
from .whole_matrices import LatentGrid, MaskedDense


@dataclass(frozen=True)
class Lora(TrainConfig):
    """`rank` holds where a linear has no factors yet; existing ones train as they are, on a grid by their scales. Factors are folded
    (α = R): no scaling. `scales`: the group scales of the quantized weights as well, which costs no byte (auto: wherever there are any).
    `prune_ranks`: the share of all ranks dropped after training, those whose removal costs least; a linear may lose all of its own."""

    rank: Width = 16
    norms: bool = False
    biases: bool = False
    scales: bool | Literal["auto"] = False
    prune_ranks: Share = 0.0


@dataclass(frozen=True)
class Dora(TrainConfig):
    rank: Width = 16
    norms: bool = False


@dataclass(frozen=True)
class QaLora(TrainConfig):
    rank: Width = 16


@dataclass(frozen=True)
class Svft(TrainConfig):
    """rank 0 keeps every singular vector; width is the band's half width, or the mean number of random entries a row."""

    rank: WidthOrZero = 64
    pattern: Literal["plain", "banded", "random"] = "banded"
    width: Annotated[WidthOrZero, ReadWhere("pattern is banded or random", lambda config: config.pattern != "plain")] = 8


@dataclass(frozen=True)
class Perp(TrainConfig):
    """Which subsets train; `lora` names a retraining pair for pruned dense weights."""

    norms: bool = True
    biases: bool = True
    head: bool = False
    embeddings: bool = False
    lora: LoraVariant | Literal["none"] = "none"
    rank: Annotated[Width, ReadWhere("lora is not none", lambda config: config.lora != "none")] = 16
    alpha: Annotated[Factor, ReadWhere("lora is mask_lora or lora_prune", lambda config: config.lora in ("mask_lora", "lora_prune"))] = 32.0


@dataclass(frozen=True)
class Scales(TrainConfig):
    """`scales` auto: those of the linears that have a grid, where others have none."""

    scales: bool | Literal["auto"] = True
    norms: bool = True
    biases: bool = False
    zeros: bool = False
    low_rank: bool = False


@dataclass(frozen=True)
class BitFit(TrainConfig):
    create: bool = True
    head: bool = False


@dataclass(frozen=True)
class Full(TrainConfig):
    """`shard`: of every block's weights, gradients and moments each of several processes holds a part (`sharded`); their number is in the key then."""

    norms: bool = True
    biases: bool = True
    embeddings: bool = False
    head: bool = False
    shard: bool = False


@dataclass(frozen=True)
class Qat(TrainConfig):
    """`shard` as in `Full`, of the latents."""

    norms: bool = True
    shard: bool = False


@dataclass(frozen=True)
class DequantizeTrainRequantize(TrainConfig):
    """`quantizer`: gptq rounds once behind training, block by block on the calibration text, so that what is tried on the way is the trained
    weight itself; rtn rounds to the nearest level of freshly fitted grids whenever the stored form is asked for."""

    norms: bool = True
    quantizer: Literal["gptq", "rtn"] = "gptq"


def lora(site: AttachSite, config: Lora) -> Attached:
    out: dict[str, Trainable] = {}
    for name, linear in site.linears.items():
        if linear.up is None:
            up, down = start_factors(linear.stored.shape, config.rank, site.generator(name))
            linear.set_low_rank(up.to(linear.device), down.to(linear.device))
    out |= train_factors(site.linears)
    if config.scales:
        out |= _train_scales(site.on_grids() if config.scales == "auto" else site)
    own = ("up", "down", "up_scales", "down_scales", "stored")
    started = {name: {key: getattr(linear, key) for key in own} for name, linear in site.linears.items()}

    def prune(on: bool) -> dict[str, int]:
        pairs = {name: before["up"].shape[1] for name, before in started.items()}
        if not on:
            for name, linear in site.linears.items():
                for key, value in started[name].items():
                    setattr(linear, key, value)
            return pairs
        total = sum(pairs.values())
        return prune_ranks(site.linears, total - round(config.prune_ranks * total))

    return joined(Attached(out, prune=prune if config.prune_ranks else None), *_with_norms_and_biases(site, config.norms, config.biases))


def dora(site: AttachSite, config: Dora) -> Attached:
    pairs = lora(site, Lora(config.rank, config.norms))
    for name, linear in site.linears.items():
        linear.after = Magnitude(linear)
        pairs.trainables |= _named(name, linear.after.trainables())
    pairs.stored_form = as_records(site.linears.values())  # scales of 16 bits, and absmax of 8, take row magnitudes to the nearest
    return pairs


def qa_lora(site: AttachSite, config: QaLora) -> Attached:
    out: dict[str, Trainable] = {}
    for name, linear in site.linears.items():
        pair = PooledPair(linear.stored, config.rank, site.generator(name))
        linear.branches.append(pair)
        out |= _named(name, pair.trainables())
    return Attached(out)


def svft(site: AttachSite, config: Svft) -> Attached:
    out: dict[str, Trainable] = {}
    branches = []
    for name, linear in site.linears.items():
        weight = linear.stored.base_dense()
        if linear.stored.smooth is not None:
            weight = weight / linear.stored.smooth.float()
        branch = Spectrum(weight, config.rank, config.pattern, config.width, site.generator(name), torch.float16)
        branch.merges = takes_dense(linear.stored)
        linear.branches.append(branch)
        branches.append(branch)
        out |= _named(name, branch.trainables())

    def stored_form(on: bool) -> None:
        for branch in branches:
            branch.as_stored = on and not branch.merges

    return Attached(out, stored_form=stored_form)


def perp(site: AttachSite, config: Perp) -> Attached:
    parts = [train_norms(site, alone=config.lora == "none")] if config.norms else []
    parts += [train_biases(site)] if config.biases else []
    parts.append(train_embeddings(site, config.head, config.embeddings))
    if config.lora != "none":
        parts.append(_retraining_pairs(site, config.lora, config.rank, config.alpha))
    return joined(*parts)


def _retraining_pairs(site: AttachSite, variant: LoraVariant, rank: int, alpha: float) -> Attached:
    out: dict[str, Trainable] = {}
    pairs = []
    for name, linear in site.linears.items():
        pair = MaskedLowRank(linear.stored, rank, alpha, variant, site.generator(name))
        linear.reweight = pair
        pairs.append(pair)
        out |= _named(name, pair.trainables())

    def stored_form(on: bool) -> None:
        for pair in pairs:
            pair.pruned = on

    return Attached(out, stored_form=stored_form)


def scales(site: AttachSite, config: Scales) -> Attached:
    chosen = site.on_grids() if config.scales == "auto" else site
    out = _train_scales(chosen, bool(config.scales), config.zeros) if config.scales or config.zeros else {}
    if config.low_rank:
        out |= train_factors(site.linears)
    return joined(Attached(out), *_with_norms_and_biases(site, config.norms, config.biases))


def bitfit(site: AttachSite, config: BitFit) -> Attached:
    return joined(train_biases(site, config.create), train_embeddings(site, config.head, False))


def full(site: AttachSite, config: Full) -> Attached:
    return _whole(site, config, {name: MaskedDense(linear.stored) for name, linear in site.linears.items()})


def _whole(site: AttachSite, config: Full, weights: Mapping[str, MaskedDense]) -> Attached:
    out: dict[str, Trainable] = {}
    for name, linear in site.linears.items():
        linear.reweight = weights[name]
        out |= _named(name, linear.reweight.trainables())
    out |= train_factors(site.linears)
    biases = train_biases(site, create=False, norms=False) if config.biases else Attached({})
    norms = train_norms(site) if config.norms else Attached({})
    return joined(Attached(out), norms, biases, train_embeddings(site, config.head, config.embeddings))


def dequantize_train_requantize(site: AttachSite, config: DequantizeTrainRequantize) -> Attached:
    weights = {name: MaskedDense(linear.stored, config.quantizer == "gptq") for name, linear in site.linears.items()}
    attached = _whole(site, Full(norms=config.norms, biases=False), weights)
    attached.unrounded = {name: weight for name, weight in weights.items() if weight.waits}
    return attached


def qat(site: AttachSite, config: Qat) -> Attached:
    out: dict[str, Trainable] = {}
    for name, linear in site.linears.items():
        linear.reweight = LatentGrid(linear.stored)
        out |= _named(name, linear.reweight.trainables())
    return joined(Attached(out), *_with_norms_and_biases(site, config.norms, False))


def _train_scales(site: AttachSite, scales: bool = True, zeros: bool = False) -> dict[str, Trainable]:
    out: dict[str, Trainable] = {}
    for name, linear in site.linears.items():
        if isinstance(linear.stored.base, GgmlWeight):
            linear.reweight = SuperScales(linear.stored)
            out |= _named(name, linear.reweight.trainables())
        else:
            linear.reweight = RelativeScales(linear.stored, zeros)
            out |= _named(name, linear.reweight.trainables(scales))
    return out


def _with_norms_and_biases(site: AttachSite, norms: bool, biases: bool) -> list[Attached]:
    """Only what is asked for is touched: `train_biases` creates what the architecture has not."""
    return ([train_norms(site)] if norms else []) + ([train_biases(site)] if biases else [])


def _named(name: str, trainables: dict[str, Trainable]) -> dict[str, Trainable]:
    return {f"{name}.{key}": t for key, t in trainables.items()}
