"""Predicted seconds and bytes of every stage of a run on its device, and which of them exceed what the machine has.

Combines `stage_costs`, `recovery_costs`, `reconstruction_costs` and a device's measured speeds. Knows the process's own memory; reads no weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...compress.options import Setting
from .. import doctor
from ..allocation.spending import Outside, Spent
from ..devices.compute import Compute
from ..devices.rates import Speeds, Work, measured
from ..devices.shortage import advice
from ..evaluation.measure import resident_bytes
from ..models.hidden import SHARE
from ..models.replay import REPLAY_SHARE
from ..models.sizes import Sizes
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec
from ..stages.fuse import ROOM
from ..stages.writing import DENSE_CACHE_BYTES
from . import reconstruction_costs, recovery_costs, stage_costs, table_costs
from .anatomy import Anatomy
from .cost_plan import OPENED, CostPlan, Needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_WINDOWS = 160
"""Of an evaluation of the whole text: what WikiText-2's test split holds at 2048 tokens, about."""
CUDA_HOST_BYTES = 0.6e9
"""Of a process once a CUDA context lies in it; not measured here, the order of what drivers take."""
STAGE_BYTES = 10e6
"""What a stage adds to the process in addition to tensors: modules, their code's objects, an allocator's slack; measured on models of 2 and 4 blocks."""
KERNEL_COPIES = 1.3
"""Packed for the kernels a record takes somewhat more."""
SURE = 1.2
"""A prediction may err by a fifth: what lies above by more than that will not fit."""


@dataclass(frozen=True)
class RunCosts:
    """Asked stage by stage, in the order of the recipe."""

    plan: CostPlan
    compute: Compute
    speeds: Speeds
    base: float

    @classmethod
    def of(cls, model: "PreTrainedModel", recipe: Recipe, compute: Compute, element: float) -> "RunCosts":
        """Measures the device for a moment."""
        plan = CostPlan(Anatomy(model), recipe, compute.device, compute.dtype, element)
        on_card = compute.device.type == "cuda"
        return cls(plan, compute, measured(compute), float(resident_bytes()) + (CUDA_HOST_BYTES if on_card else 0.0))

    def baseline(self, sizes: Sizes) -> tuple[Needs, ...]:
        """Importing the model, and measuring it."""
        imported = Needs(Work(files=2 * sizes.total_bytes()), 0.0, 2 * self.plan.anatomy.block_parameters * self.plan.element)
        return imported, self._evaluation(sizes, teacher=False)

    def stage(self, spec: StageSpec, before: Sizes, after: Sizes, first: bool, gathered: Sequence[Needs] = ()) -> tuple[Needs, ...]:
        """What is `gathered` for a stage, the stage from what its parent stores to what it leaves, and its evaluation, one after the other."""
        return *gathered, self.needs(spec, before, after, first), self._evaluation(after, teacher=True)

    def self_text(self) -> Needs:
        return table_costs.self_text(self.plan)

    def fisher(self) -> Needs:
        return table_costs.fisher(self.plan)

    def guidance(self, spec: StageSpec) -> Needs:
        return table_costs.guidance(self.plan, spec)

    def table(self, stages: Spent, settings: Sequence[Setting], before: Sizes, blocks: int, outside: Sequence[Outside]) -> Needs:
        """Of so many blocks, and of matrices outside of them, of a budget's table of errors."""
        result = table_costs.table(self.plan, stages, settings, _has_records(before), blocks)
        return result.most(table_costs.outside_table(self.plan, outside)) if outside else result

    def needs(self, spec: StageSpec, before: Sizes, after: Sizes, first: bool) -> Needs:
        """Of the stage alone, without its evaluation."""
        if spec.name == "fuse":
            return self._fused(after)
        if spec.name == "recover":
            if spec.method == "reconstruct":
                return reconstruction_costs.reconstructed(self.plan, spec, before, self._dense_budget(spec))
            return recovery_costs.recovered(self.plan, spec, before, self._dense_budget(spec), self.available(device=True))
        return stage_costs.compressed(self.plan, spec, _has_records(before), first, after.total_bytes())

    def _evaluation(self, sizes: Sizes, teacher: bool) -> Needs:
        windows = self.plan.recipe.evaluation.windows or ALL_WINDOWS
        return stage_costs.evaluated(self.plan, windows, _has_records(sizes), teacher)

    def _fused(self, sizes: Sizes) -> Needs:
        """Copies of files, and the whole model on its kernels for a few tokens."""
        anatomy = self.plan.anatomy
        speaking = Work(
            {self.plan.dtype: 48.0 * (anatomy.in_blocks + anatomy.outside)}, passes=32 * sizes.total_bytes(), calls=32 * 60 * anatomy.blocks
        )
        whole = KERNEL_COPIES * sizes.total_bytes() + self.plan.outside_bytes
        if sizes.total_bytes() * ROOM > self.available(device=True):  # its first block alone
            whole = (
                KERNEL_COPIES * (sizes.total_bytes() - anatomy.outside * self.plan.element) / anatomy.blocks + 2 * self.plan.outside_bytes
            )
        return Needs(speaking + OPENED * 3 + Work(files=sizes.total_bytes()), whole, anatomy.outside * self.plan.element)

    def _dense_budget(self, spec: StageSpec) -> float:
        """Bytes of rebuilt matrices that recovery will keep at most, as it decides by what is free."""
        limit = DENSE_CACHE_BYTES if self.compute.device.type == "cpu" else math.inf
        auto = min(self.available(device=True) / 3, limit)
        return {"auto": auto, "always": math.inf, "never": 0.0}[getattr(spec.config, "cache_dense", "auto")]

    def row(self, parts: Sequence[Needs]) -> dict[str, Any]:
        """What one process takes of the device, of the host and of time."""
        placed = [self.placed(part) for part in parts]
        device, host = (max(bytes_) for bytes_ in zip(*placed, strict=True))
        return {
            "device_bytes": round(device),
            "host_bytes": round(host),
            "seconds": round(sum(self.speeds.seconds(p.work) for p in parts), 1),
        }

    def placed(self, needs: Needs) -> tuple[float, float]:
        """(device bytes, host bytes) with hidden states where there is room for them; on a CPU both are one memory."""
        room = SHARE * max(0.0, self.available(device=True) - self.plan.outside_bytes)
        kept = min(needs.hidden, room)
        kept, spilled = kept + min(needs.replayed, REPLAY_SHARE * (room - kept)), needs.hidden - kept
        if self.compute.device.type == "cpu":
            whole = self.base + STAGE_BYTES + needs.device + needs.host + kept
            return whole, whole
        return needs.device + kept, self.base + STAGE_BYTES + needs.host + min(spilled, SHARE * self.available(device=False))

    def available(self, device: bool) -> float:
        """Bytes that there are for this process: of the card, or of the machine's memory (with what the process has already)."""
        if device and self.compute.device.type == "cuda":
            return float(torch.cuda.mem_get_info(self.compute.device)[1])
        result = doctor.memory()
        known = [n for n in (result["limit_bytes"], result["available_bytes"]) if n is not None]
        return float(min(known)) if known else float("inf")

    def shortages(self, specs: Mapping[str, StageSpec | None], rows: list[dict[str, Any]]) -> list[str]:
        """A line for every stage that will not fit, with the settings that want less."""
        lines = []
        on_card = self.compute.device.type == "cuda"
        for row in rows:
            for kind in ("device", "host") if on_card else ("host",):
                needed, there = row[f"{kind}_bytes"], self.available(device=kind == "device")
                if needed > SURE * there:
                    name = "device memory" if kind == "device" else "memory"
                    lines.append(
                        f"{row['stage']} needs about {needed / 1e9:,.1f} GB of {name}, and {there / 1e9:,.1f} GB are there; "
                        f"{advice(row['stage'], specs.get(row['stage']))}"
                    )
        return lines


def _has_records(sizes: Sizes) -> bool:
    return any(size.compressed for size in sizes.of.values())
