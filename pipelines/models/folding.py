"""Folds smoothing into the norm before it, at fuse: the norm then gives x / s, and nothing divides at run time.

For y = base·Q(x / s) + up·(down·x) with x = norm(·)·w: the norm's weight becomes w / s, and down becomes down·s, since it sees x / s as
well. This holds where the norm's output reaches only linears of that one smoothing vector. Which modules read it is seen by running the
block, and every fold is proven by running the block again: the same outputs, or it is taken back and the reason noted.
Knows a loaded block and its records; not files.
Legend: O out, I in, R rank, N windows, T tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.weights import StoredWeight, UniformWeight

TOLERANCE = 1e-4  # of what the block adds to its input, in float32


@dataclass(frozen=True)
class Folded:
    """records: those of the block's linears that changed, by name; tensors: norms' new parameters by name, float32, since they hold what
    was two roundings; notes: what stays as it is and why."""

    records: Mapping[str, StoredWeight]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def fold_block(
    block: nn.Module, prefix: str, records: Mapping[str, StoredWeight], hidden_NTD: Tensor, run: Callable[[Tensor], Tensor]
) -> Folded:
    """Fold what can be folded of one block, loaded with the dense effective weights of `records` (by full name; `prefix` is the block's,
    with its dot) in float32; `run` is its forward pass. The block is left as it was."""
    smoothed = {name: record for name, record in records.items() if record.smooth is not None}
    if not smoothed:
        return Folded({}, {}, ())
    reads = _readers(block, prefix, records, hidden_NTD, run)
    changed: dict[str, StoredWeight] = {}
    tensors: dict[str, Tensor] = {}
    notes = []
    for norm, readers in reads.items():
        wanted = [name for name in readers if name in smoothed]
        if not wanted:
            continue
        problem = _differ(readers, records)
        result = None if problem else _fold(block, prefix, norm, readers, records, hidden_NTD, run)
        if result is None:
            notes.append(f"{prefix}{norm}: {problem or 'its output is used elsewhere too'}; the smoothing of {', '.join(wanted)} stays")
            continue
        changed |= result[0]
        tensors |= result[1]
    unread = sorted(smoothed.keys() - {name for readers in reads.values() for name in readers})
    if unread:
        notes.append(f"{', '.join(unread)}: no norm stands right before, so the smoothing stays")
    return Folded(changed, tensors, tuple(notes))


def folded_record(record: StoredWeight) -> StoredWeight:
    """The record for x / smooth in place of x. The right factor takes the smoothing up, in its own dtype where that holds it and in
    bfloat16 where it does not; one on a grid becomes floating."""
    assert record.smooth is not None
    if record.low_rank is None:
        return replace(record, smooth=None)
    down = record.low_rank.down
    dtype = torch.float16 if isinstance(down, UniformWeight) else down.dtype
    values = record.low_rank.factors()[1] * record.smooth.float()
    if dtype == torch.float16 and not bool(torch.isfinite(values.half()).all()):
        dtype = torch.bfloat16
    return replace(record, smooth=None, low_rank=replace(record.low_rank, down=values.to(dtype)))


def _readers(
    block: nn.Module, prefix: str, records: Mapping[str, StoredWeight], hidden_NTD: Tensor, run: Callable[[Tensor], Tensor]
) -> dict[str, list[str]]:
    """Norm → the compressed linears that are handed the very tensor it returns, in a block's own names and in full ones."""
    given: list[tuple[str, object]] = []
    reads: dict[str, list[str]] = {}
    handles = []
    for name, module in block.named_modules():
        if _is_norm(module):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: given.append((name, out))))
        elif f"{prefix}{name}" in records or isinstance(module, nn.Linear):

            def before(m: nn.Module, args: tuple[object, ...], name: str = name) -> None:
                source = next((norm for norm, out in reversed(given) if out is args[0]), None)
                if source is not None:
                    reads.setdefault(source, []).append(f"{prefix}{name}")

            handles.append(module.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            run(hidden_NTD)
    finally:
        for handle in handles:
            handle.remove()
    return reads


def _is_norm(module: nn.Module) -> bool:
    """Something with one vector as weight, and a bias at most."""
    own = dict(module.named_parameters(recurse=False))
    return set(own) in ({"weight"}, {"weight", "bias"}) and own["weight"].ndim == 1


def _differ(readers: list[str], records: Mapping[str, StoredWeight]) -> str | None:
    """Why the readers of a norm cannot share one fold."""
    plain = [name for name in readers if name not in records or records[name].smooth is None]
    if plain:
        return f"{', '.join(plain)} reads its output without smoothing"
    first = records[readers[0]].smooth
    if any(not torch.equal(records[name].smooth, first) for name in readers):  # type: ignore[arg-type]
        return "the linears that read its output have different smoothing vectors"
    if any(records[name].delta is not None for name in readers):
        return "a sparse delta sees the raw input"
    return None


def _fold(
    block: nn.Module,
    prefix: str,
    norm: str,
    readers: list[str],
    records: Mapping[str, StoredWeight],
    hidden_NTD: Tensor,
    run: Callable[[Tensor], Tensor],
) -> tuple[dict[str, StoredWeight], dict[str, Tensor]] | None:
    """(records, norm's parameters), or None where the block then computes something else. The proof scales the dense weights' columns
    by s, so that rounding of factors does not count. A norm whose weight is an offset to 1 (Gemma) is tried as such."""
    smooth = records[readers[0]].smooth
    assert smooth is not None
    module: Any = block.get_submodule(norm)
    before = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
    weights = [block.get_submodule(name.removeprefix(prefix))._parameters["weight"] for name in readers]
    columns = [1 if isinstance(block.get_submodule(name.removeprefix(prefix)), nn.Linear) else 0 for name in readers]  # Conv1D: [I, O]
    dense = [weight.data for weight in weights if weight is not None]
    s = smooth.to(before["weight"])
    with torch.no_grad():
        expected = run(hidden_NTD)
        added = (expected - hidden_NTD).norm()
        try:
            for weight, dim in zip(weights, columns, strict=True):
                assert weight is not None
                weight.data = weight.data * (s if dim else s.unsqueeze(1))
            for offset in (0.0, 1.0):
                after = {"weight": (before["weight"] + offset) / s - offset} | {n: b / s for n, b in before.items() if n == "bias"}
                for name, value in after.items():
                    module._parameters[name].data = value
                if (run(hidden_NTD) - expected).norm() <= TOLERANCE * added:
                    return {name: folded_record(records[name]) for name in readers}, {f"{prefix}{norm}.{n}": v for n, v in after.items()}
        finally:
            for name, value in before.items():
                module._parameters[name].data = value
            for weight, value in zip(weights, dense, strict=True):
                assert weight is not None
                weight.data = value
    return None
