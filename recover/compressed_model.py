"""The compressed linears of a model: put in the place of its own, found again, what is kept dense of them, and all of them run as records.

Knows modules and records; not how a linear multiplies.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..compress.weights import StoredWeight
from .compressed_linear import CompressedLinear
from .experts import install_experts, is_expert


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def install(model: nn.Module, records: Mapping[str, StoredWeight], dtype: torch.dtype = torch.float32) -> dict[str, CompressedLinear]:
    """Put a CompressedLinear in the place of each named linear (nn.Linear or Conv1D), keeping its bias, and of each expert of a fused
    parameter (`<parameter>.<number>`), and freeze the model. ValueError where only some experts of a parameter are named."""
    model.requires_grad_(False)
    experts = {name: CompressedLinear(stored, None, dtype) for name, stored in records.items() if is_expert(model, name)}
    out: dict[str, CompressedLinear] = {}
    for name, stored in records.items():
        if name in experts:
            out[name] = experts[name]
            continue
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        bias = getattr(parent, last).bias
        out[name] = CompressedLinear(stored, bias, dtype)
        setattr(parent, last, out[name])
    install_experts(model, experts)
    return out


def cache_dense(linears: Mapping[str, CompressedLinear], budget_bytes: float) -> int:
    """Keep what fits into `budget_bytes` of all matrices: the bases and what training makes of them, rebuilt once a step; else one matrix of each
    linear; else nothing. The bytes that will be kept. Results are bit-identical either way."""
    sizes = {name: linear.kept_bytes() for name, linear in linears.items()}
    everything, single = sum(base + own for base, own in sizes.values()), sum(own or base for base, own in sizes.values())
    for name, linear in linears.items():
        base, own = sizes[name]
        linear.cache(base > 0 and (everything <= budget_bytes or (single <= budget_bytes and not own)))
        linear.holds = own > 0 and single <= budget_bytes
    return everything if everything <= budget_bytes else single if single <= budget_bytes else 0


@contextmanager
def steady(linears: Iterable[CompressedLinear]) -> Iterator[None]:
    """Within, no trained value moves: linears that hold their matrix build it once."""
    chosen = list(linears)
    try:
        for linear in chosen:
            linear.steady(True)
        yield
    finally:
        for linear in chosen:
            linear.steady(False)


def as_records(linears: Iterable[CompressedLinear]) -> Callable[[bool], None]:
    """A `stored_form` for what folds into a record with more rounding than that of each trained value: when on, the linears hold and run
    the records that `to_stored` makes of them."""
    chosen, kept = list(linears), list[dict[str, object]]()
    own = ("stored", "up", "down", "up_scales", "down_scales", "after")

    def switch(on: bool) -> None:
        if on == bool(kept):
            return
        if on:
            kept.extend({name: getattr(linear, name) for name in own} for linear in chosen)
            for linear in chosen:
                record, _ = linear.to_stored()
                linear.stored, linear.after = record, None
                if record.low_rank is not None:
                    linear.set_low_rank(*record.low_rank.factors())
                linear.cache(linear.cached)
            return
        for linear, before in zip(chosen, kept, strict=True):
            for name, value in before.items():
                setattr(linear, name, value)
            linear.cache(linear.cached)
        kept.clear()

    return switch
