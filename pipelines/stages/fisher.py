"""Fisher information of the baseline's matrices: squared gradients of the loss, summed over sequences one at a time.

A gradient is squared, reduced to its row and column means and dropped as soon as it is complete, so the gradients of the whole model
never lie beside each other. Knows the baseline; what the numbers are for is the methods' business.
"""

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...compress.statistics import Fisher
from ..artifact import write_bytes
from ..blocks import StreamedModel
from ..errors import InputError
from ..logs import track
from ..models import Site
from .context import Context, check_stop


def fisher_diagonal(context: Context, full: frozenset[str] = frozenset()) -> dict[str, Fisher]:
    """Site name → Fisher (arXiv:2311.12023, section 3.2). Row and column means are kept beside the baseline for the next method;
    sites in `full` get the whole [O, I] matrix as well (FishMask), which is not kept."""
    path = context.baseline_metrics / f"fisher-{context.inputs.calibration_fingerprint()[:8]}.safetensors"
    if path.is_file() and not full:
        with safe_open(path, framework="pt") as file:
            names = {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118
            return {n: Fisher(file.get_tensor(f"{n}.row"), file.get_tensor(f"{n}.column")) for n in names}
    found = _collect(context, full)
    if not any(bool(f.row_mean_O.any()) for f in found.values()):
        raise InputError(
            "Fisher information is 0 everywhere: the loss does not depend on any matrix; check the calibration text and the model"
        )
    tensors = {f"{n}.{kind}": t for n, f in found.items() for kind, t in (("row", f.row_mean_O), ("column", f.column_mean_I))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors))
    return found


def _collect(context: Context, full: frozenset[str]) -> dict[str, Fisher]:
    model = StreamedModel(context.baseline, context.device, torch.float32)
    for index in range(model.structure.blocks):
        model.load_block(index)
    sites = [s for s in model.structure.sites if s.block is not None]
    sums = {s.name: _Sums(s, s.name in full) for s in sites}
    by_parameter: dict[str, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(f"{site.module}.{site.parameter}", []).append(site)
    for name, members in by_parameter.items():
        parameter = model.model.get_parameter(name)
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(_consume(members, sums))
    for ids_T in track(context.inputs.calibration(), "Fisher information, sequences"):
        logits_TV = model.model(ids_T.unsqueeze(0).to(context.device), use_cache=False).logits[0]
        nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:].to(context.device)).backward()
        check_stop(context)
    return {name: found.fisher() for name, found in sums.items()}


class _Sums:
    """Σ over sequences of squared gradients of one site, reduced."""

    def __init__(self, site: Site, full: bool):
        rows, columns = site.shape
        self.row = torch.zeros(rows, dtype=torch.float64)
        self.column = torch.zeros(columns, dtype=torch.float64)
        self.full = torch.zeros(rows, columns) if full else None

    def add(self, gradient_OI: Tensor) -> None:
        squares = gradient_OI.float().square()
        self.row += squares.mean(1).double().cpu()
        self.column += squares.mean(0).double().cpu()
        if self.full is not None:
            self.full += squares.cpu()

    def fisher(self) -> Fisher:
        return Fisher(self.row.float(), self.column.float(), self.full)


def _consume(members: list[Site], sums: dict[str, _Sums]):
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for site in members:
            sums[site.name].add(site.read(parameter.grad))
        parameter.grad = None

    return hook
