"""What a method may know about a matrix's inputs, gathered in a stream and shared by all matrices that read the same input.

Knows tensors only: who calls `update`, and on which text, is `pipelines/blocks`' business.
Legend: T tokens, I input features, O output features.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NEEDS = frozenset({"norms", "absmax", "absmean", "second_moment", "cross_moment", "samples", "fisher"})
"""Every statistic a method can ask for; `fisher` concerns the weight, all others its input."""


@dataclass
class InputStatistics:
    """Streaming sums over the rows of x; `second_moment` is E[x xᵀ] and `cross_moment` E[x_dense xᵀ], both float32 [I, I]."""

    features: int
    needs: frozenset[str]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_samples: int = 512
    tokens: int = 0
    square_sum_I: Tensor = field(init=False)
    absmax_I: Tensor = field(init=False)
    abs_sum_I: Tensor = field(init=False)
    moment_sum_II: Tensor | None = field(init=False, default=None)
    cross_sum_II: Tensor | None = field(init=False, default=None)
    samples_TI: Tensor | None = field(init=False, default=None)
    factors: dict[Hashable, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """What methods derived from the sums and share between the matrices of this input; forgotten on `update`."""

    def __post_init__(self) -> None:
        unknown = self.needs - NEEDS
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known are {sorted(NEEDS)}")
        zeros = torch.zeros(self.features, dtype=torch.float32, device=self.device)
        self.square_sum_I, self.absmax_I, self.abs_sum_I = zeros.double(), zeros.clone(), zeros.double()
        square = (self.features, self.features)
        if "second_moment" in self.needs:
            self.moment_sum_II = torch.zeros(square, dtype=torch.float32, device=self.device)
        if "cross_moment" in self.needs:
            self.cross_sum_II = torch.zeros(square, dtype=torch.float32, device=self.device)

    def update(self, x: Tensor, x_dense: Tensor | None = None) -> None:
        """Add the rows of x [..., I]; `x_dense` is the same rows as the uncompressed model produces them."""
        x_TI = x.detach().reshape(-1, self.features).to(self.device, torch.float32)
        self.square_sum_I += x_TI.square().sum(0)
        self.absmax_I = torch.maximum(self.absmax_I, x_TI.abs().amax(0)) if len(x_TI) else self.absmax_I
        self.abs_sum_I += x_TI.abs().sum(0)
        if self.moment_sum_II is not None:
            self.moment_sum_II.addmm_(x_TI.T, x_TI)
        if self.cross_sum_II is not None:
            if x_dense is None:
                raise ValueError("cross_moment needs the dense model's inputs beside the compressed ones")
            self.cross_sum_II.addmm_(x_dense.detach().reshape(-1, self.features).to(x_TI).T, x_TI)
        if "samples" in self.needs:
            kept = 0 if self.samples_TI is None else len(self.samples_TI)
            fresh = x_TI[: self.max_samples - kept].clone()
            self.samples_TI = fresh if self.samples_TI is None else torch.cat((self.samples_TI, fresh))
        self.tokens += len(x_TI)
        self.factors.clear()

    @property
    def norm_I(self) -> Tensor:
        """‖x_j‖₂ over all tokens, float32 [I]."""
        return self.square_sum_I.sqrt().float()

    @property
    def absmean_I(self) -> Tensor:
        return (self.abs_sum_I / max(self.tokens, 1)).float()

    @property
    def second_moment_II(self) -> Tensor:
        if self.moment_sum_II is None:
            raise ValueError("second_moment was not collected")
        return self.moment_sum_II / max(self.tokens, 1)

    @property
    def cross_moment_II(self) -> Tensor:
        if self.cross_sum_II is None:
            raise ValueError("cross_moment was not collected")
        return self.cross_sum_II / max(self.tokens, 1)

    def non_finite(self) -> str | None:
        """The name of the first statistic that holds NaN or Inf, or None."""
        named: Mapping[str, Tensor | None] = {
            "square_sum": self.square_sum_I,
            "absmax": self.absmax_I,
            "second_moment": self.moment_sum_II,
            "cross_moment": self.cross_sum_II,
        }
        return next((n for n, t in named.items() if t is not None and not bool(torch.isfinite(t).all())), None)


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information of one weight: Σ over sequences of squared gradients, as means per row and per column
    (what LQ-LoRA weights its error with) and, when asked for, in full."""

    row_mean_O: Tensor
    column_mean_I: Tensor
    full_OI: Tensor | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """All that a method may know about one matrix besides its weights."""

    inputs: InputStatistics
    fisher: Fisher | None = None
