"""Where a method is attached: the model, the chosen compressed linears and plain parameters, and the randomness by name.

Legend: none; deals in modules.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.weights import DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight
from . import selection
from .compressed_linear import CompressedLinear
from .compressed_model import compressed_linears
from .experts import is_expert
from .student import Batch
from .trainable import Attached, Trainable, master


@dataclass(frozen=True)
class Gradients:
    """What criteria by gradient read: batches by number, and the loss of one batch, differentiable."""

    batch: Callable[[int], Batch]
    loss: Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class AttachSite:
    model: nn.Module
    place: selection.Where
    linears: dict[str, CompressedLinear]
    seed: int
    steps: int
    gradients: Gradients | None = None

    def on_grids(self) -> "AttachSite":
        """Only the linears whose base is quantized."""
        kept = {name: linear for name, linear in self.linears.items() if not isinstance(linear.stored.base, DenseWeight)}
        return replace(self, linears=kept)

    def generator(self, name: str, step: int = 0) -> torch.Generator:
        """Randomness that depends on seed, name and step only."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 65_537 + zlib.crc32(name.encode()))


def site_of(
    model: nn.Module, targets: str | tuple[str, ...], layers: str | tuple[int, ...], seed: int, steps: int, gradients: Gradients | None
) -> AttachSite:
    """ValueError when the choice leaves no compressed linear."""
    place = selection.where(model, targets, layers)
    every = compressed_linears(model)
    chosen = {name: every[name] for name in selection.chosen_linears(place, list(every), targets, layers)}
    return AttachSite(model, place, chosen, seed, steps, gradients)


def kinds(stored: StoredWeight) -> frozenset[str]:
    """What a record is made of, in the words that `Method.serves` reads."""
    base, out = stored.base, set()
    out.add({DenseWeight: "dense", UniformWeight: "uniform", NormalFloatWeight: "normal_float", GgmlWeight: "ggml"}[type(base)])
    if isinstance(base, UniformWeight) and base.zeros is not None and base.zeros.is_floating_point():
        out.add("float_zeros")
    if isinstance(base, NormalFloatWeight) and base.absmax is None:
        out.add("double_quantized")
    if stored.low_rank is not None:
        out.add("low_rank")
        if isinstance(stored.low_rank.up, UniformWeight) or isinstance(stored.low_rank.down, UniformWeight):
            out.add("quantized_factors")
    named = {"masked": stored.mask, "smooth": stored.smooth, "activations": stored.activations, "delta": stored.delta}
    return frozenset(out | {name for name, value in named.items() if value is not None})


def train_factors(linears: Mapping[str, CompressedLinear]) -> dict[str, Trainable]:
    """The low-rank pairs of those that have one. A right factor that some of them share is one parameter, under its holder's name."""
    out: dict[str, Trainable] = {}
    for name, linear in linears.items():
        if linear.up is None:
            continue
        low_rank = linear.stored.low_rank
        holder = None if low_rank is None or low_rank.shared is None else linears.get(low_rank.shared)
        result = linear.train_low_rank()
        if holder is not None and holder.down is not None:
            result = {key: t for key, t in result.items() if not key.startswith("down")}
            linear.down, linear.down_scales = holder.down, holder.down_scales
        out |= {f"{name}.{key}": t for key, t in result.items()}
    return out


def train_norms(site: AttachSite, alone: bool = False) -> Attached:
    """Weights (and biases) of every normalisation at the chosen depth; `alone`: no weights are trained with them."""
    out = Attached({})
    for name in selection.norms(site.model, site.place):
        module = site.model.get_submodule(name)
        unit = gain(module)
        for part, parameter in module.named_parameters(recurse=False):
            _plain(site, out, f"{name}.{part}", parameter, "norms" if alone else "norms_with_others", unit)
    return out


@torch.no_grad()
def gain(norm: nn.Module) -> float:
    """How much larger than 1 (root mean square) a normalised vector leaves: of SmolLM2's norms 0.03 to 0.9, so that one absolute rate would
    be a hundredth of one norm and a seventh of another. Measured, since some families store gain − 1."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    return float(norm(x).float().square().mean().sqrt()) or 1.0


def train_biases(site: AttachSite, create: bool = True, norms: bool = True) -> Attached:
    """Biases of the chosen linears (created as 0 where the architecture has none, if `create`) and of the norms; matrices of fused experts
    have no place for one."""
    out = Attached({})
    for name, linear in site.linears.items():
        if linear.bias is not None or (create and not is_expert(site.model, name)):
            out.trainables[f"{name}.bias"] = linear.train_bias()
    for name in selection.norms(site.model, site.place) if norms else []:
        module = site.model.get_submodule(name)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            _plain(site, out, f"{name}.bias", bias, "norms_with_others", gain(module))
    return out


def train_embeddings(site: AttachSite, head: bool, embeddings: bool) -> Attached:
    """The output head and the input embeddings; tied ones are one parameter, trained when either is asked."""
    out, model = Attached({}), site.model
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    asked = [(head, "get_output_embeddings"), (embeddings, "get_input_embeddings")]
    for module in [getattr(model, getter)() for wanted, getter in asked if wanted]:
        for parameter in module.parameters(recurse=False) if module is not None and not isinstance(module, CompressedLinear) else []:
            if names[id(parameter)] not in out.trainables:
                _plain(site, out, names[id(parameter)], parameter, "embeddings")
    return out


def _plain(site: AttachSite, out: Attached, name: str, parameter: nn.Parameter, kind: str, unit: float = 1.0) -> None:
    """A parameter of the model's own modules, which go on computing in the dtype that it had."""
    if parameter.dtype != torch.float32:
        read_in(site.model, parameter, parameter.dtype)
    out.plain[name] = parameter.dtype
    out.trainables[name] = master(parameter, kind, unit)


def read_in(model: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Make every module that owns the parameter read it in `dtype` while it runs, differentiably: a plain tensor of the same name hides it."""
    for module in model.modules():
        for leaf, own in module._parameters.items():
            if own is parameter:
                module.register_forward_pre_hook(partial(_hide, leaf, dtype))
                module.register_forward_hook(partial(_show, leaf), always_call=True)


def _hide(leaf: str, dtype: torch.dtype, module: nn.Module, args: object) -> None:
    parameter = module._parameters[leaf]
    assert parameter is not None
    module.__dict__[leaf] = parameter.to(dtype)


def _show(leaf: str, module: nn.Module, args: object, out: object) -> None:
    module.__dict__.pop(leaf, None)


def joined(*parts: Attached) -> Attached:
    """Several attachments as one; the first that sets a callback wins."""
    trainables: dict[str, Trainable] = {}
    plain: dict[str, torch.dtype] = {}
    for part in parts:
        plain |= {name: dtype for name, dtype in part.plain.items() if name not in plain}
        trainables = part.trainables | trainables
    first: dict[str, Any] = {
        key: next((v for p in parts if (v := getattr(p, key)) is not None), None)
        for key in ("before_step", "buffers", "penalty", "run", "extra_modules", "starts_without", "remove", "stored_form", "prune")
    }
    return Attached(trainables, plain, frozenset().union(*(p.adapter for p in parts)), **first)
