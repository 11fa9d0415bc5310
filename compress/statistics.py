"""Calibration statistics of a matrix's inputs, accumulated in a stream and shared by all matrices that read the same input.

Knows tensors only: who calls `update`, and on which text, is `pipelines/models/collecting`' business.
Legend: T tokens, I input features, O output features.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NEEDS = frozenset({"norms", "absmax", "absmean", "second_moment", "cross_moment", "samples", "fisher", "guidance"})
"""Every statistic a method can ask for; `fisher` concerns the weight, `guidance` input and output, all others its input."""
BY_MATRIX = frozenset({"fisher", "guidance"})
"""What is not shared by the matrices that read one input."""
MOMENTS = {"second_moment": "moment_sum_II", "cross_moment": "cross_sum_II"}
"""The sums that are as large as a weight."""
SAMPLES = 512
"""Rows of an input that `samples` keeps: the first ones."""
_STRIPE = 256


@dataclass
class InputStatistics:
    """Streaming sums over the rows of x; `second_moment` is E[x xᵀ] and `cross_moment` E[x_dense xᵀ], both float32 [I, I].

    Input norms are always at hand; every other statistic only when it is among the `needs`. Memory is taken when the first row arrives: an
    expert that no token reaches takes none.
    """

    features: int
    needs: frozenset[str]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_samples: int = SAMPLES
    tokens: int = 0
    square_sum_I: Tensor | None = field(init=False, default=None)
    max_I: Tensor | None = field(init=False, default=None)
    abs_sum_I: Tensor | None = field(init=False, default=None)
    moment_sum_II: Tensor | None = field(init=False, default=None)
    """Right only from its diagonal blocks of _STRIPE upward; read `second_moment_II`."""
    cross_sum_II: Tensor | None = field(init=False, default=None)
    samples_TI: Tensor | None = field(init=False, default=None)
    factors: dict[Hashable, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """What methods derived from the sums and share between the matrices of this input; forgotten on `update`."""

    def __post_init__(self) -> None:
        unknown = self.needs - NEEDS
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known are {sorted(NEEDS)}")

    def _begin(self) -> None:
        zeros_I, square = torch.zeros(self.features, device=self.device), (self.features, self.features)
        if "second_moment" in self.needs:
            self.moment_sum_II = torch.zeros(square, device=self.device)
        else:
            self.square_sum_I = zeros_I.double()
        if "absmax" in self.needs:
            self.max_I = zeros_I.clone()
        if "absmean" in self.needs:
            self.abs_sum_I = zeros_I.double()
        if "cross_moment" in self.needs:
            self.cross_sum_II = torch.zeros(square, device=self.device)

    def update(self, x: Tensor, x_dense: Tensor | None = None) -> None:
        """Add the rows of x [..., I]; `x_dense` is the same rows as the uncompressed model produces them."""
        x_TI = x.detach().reshape(-1, self.features).to(self.device, torch.float32)
        if len(x_TI) == 0:
            return
        if self.tokens == 0:
            self._begin()
        if self.square_sum_I is not None:
            self.square_sum_I += x_TI.square().sum(0)
        if self.max_I is not None:
            torch.maximum(self.max_I, x_TI.abs().amax(0), out=self.max_I)
        if self.abs_sum_I is not None:
            self.abs_sum_I += x_TI.abs().sum(0)
        if self.moment_sum_II is not None:
            for i in range(0, self.features, _STRIPE):  # the upper triangle by stripes: 0.6 of the work of a full product
                self.moment_sum_II[i : i + _STRIPE, i:].addmm_(x_TI[:, i : i + _STRIPE].T, x_TI[:, i:])
        if self.cross_sum_II is not None:
            if x_dense is None:
                raise ValueError("cross_moment needs the dense model's inputs as well as the compressed model's")
            self.cross_sum_II.addmm_(x_dense.detach().reshape(-1, self.features).to(x_TI).T, x_TI)
        kept = 0 if self.samples_TI is None else len(self.samples_TI)
        if "samples" in self.needs and kept < self.max_samples:
            fresh = x_TI[: self.max_samples - kept].clone()
            self.samples_TI = fresh if self.samples_TI is None else torch.cat((self.samples_TI, fresh))
        self.tokens += len(x_TI)
        self.factors.clear()

    def add(self, other: "InputStatistics") -> None:
        """Add what was gathered of the rows behind these, which is left as it is. ValueError for statistics of another kind."""
        if (self.features, self.needs, self.max_samples) != (other.features, other.needs, other.max_samples):
            mine, theirs = ((s.features, sorted(s.needs), s.max_samples) for s in (self, other))
            raise ValueError(f"statistics of {theirs} (features, needs, samples) cannot be added to those of {mine}")
        for name in ("square_sum_I", "abs_sum_I", *MOMENTS.values(), "max_I"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is None:
                continue
            if mine is None:
                setattr(self, name, theirs.to(self.device, copy=True))
            elif name == "max_I":
                torch.maximum(mine, theirs.to(self.device), out=mine)
            else:
                mine += theirs.to(self.device)
        room = self.max_samples - (0 if self.samples_TI is None else len(self.samples_TI))
        if other.samples_TI is not None and room > 0:
            fresh = other.samples_TI[:room].to(self.device)
            self.samples_TI = fresh.clone() if self.samples_TI is None else torch.cat((self.samples_TI, fresh))
        self.tokens += other.tokens
        self.factors.clear()

    def without_moments(self, before: int, device: torch.device) -> "InputStatistics":
        """Everything but the moments on a device, and of the samples those for which there is room behind `before` rows."""
        other = InputStatistics(self.features, self.needs, device, self.max_samples, self.tokens)
        for name in ("square_sum_I", "abs_sum_I", "max_I"):
            sums = getattr(self, name)
            setattr(other, name, None if sums is None else sums.to(device))
        room = self.max_samples - before
        if self.samples_TI is not None and room > 0:
            other.samples_TI = self.samples_TI[:room].to(device)
        return other

    @property
    def norm_I(self) -> Tensor:
        """‖x_j‖₂ over all tokens, float32 [I]."""
        squares_I = self.square_sum_I if self.moment_sum_II is None else self.moment_sum_II.diagonal()
        return torch.zeros(self.features, device=self.device) if squares_I is None else squares_I.sqrt().float()

    @property
    def absmax_I(self) -> Tensor:
        return self._collected(self.max_I, "absmax", 1)

    @property
    def absmean_I(self) -> Tensor:
        return (self._collected(self.abs_sum_I, "absmean", 1) / max(self.tokens, 1)).float()

    @property
    def second_moment_II(self) -> Tensor:
        """E[x xᵀ], float32 [I, I], symmetric to the last bit."""
        upper_II = self._collected(self.moment_sum_II, "second_moment", 2).triu().div_(max(self.tokens, 1))
        return upper_II + upper_II.triu(1).T

    @property
    def cross_moment_II(self) -> Tensor:
        return self._collected(self.cross_sum_II, "cross_moment", 2) / max(self.tokens, 1)

    def with_moment(self, moment_II: Tensor) -> "InputStatistics":
        """The same inputs under another second moment [I, I], symmetric: only its upper triangle is read. Nothing else is known of them."""
        other = InputStatistics(self.features, frozenset({"second_moment"}), self.device)
        other.moment_sum_II, other.tokens = moment_II.float(), 1
        return other

    def _collected(self, tensor: Tensor | None, name: str, dimensions: int) -> Tensor:
        """The sum; zeros where it was to be collected and no row has arrived."""
        if tensor is None and name in self.needs:
            return torch.zeros((self.features,) * dimensions, device=self.device)
        if tensor is None:
            raise ValueError(f"{name} was not collected; a method names it in its needs (here {sorted(self.needs)})")
        return tensor

    def non_finite(self) -> str | None:
        """The name of the first statistic that holds NaN or Inf, or None."""
        named: Mapping[str, Tensor | None] = {
            "square_sum": self.norm_I if self.tokens else None,
            "absmax": self.max_I,
            "absmean": self.abs_sum_I,
            "second_moment": self.moment_sum_II,
            "cross_moment": self.cross_sum_II,
        }
        return next((n for n, t in named.items() if t is not None and not bool(torch.isfinite(t).all())), None)


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information of one weight: Σ over sequences of squared gradients, as means per row and per column
    (what LQ-LoRA weights its error with)."""

    row_mean_O: Tensor
    column_mean_I: Tensor

    def to(self, device: torch.device) -> "Fisher":
        return Fisher(self.row_mean_O.to(device), self.column_mean_I.to(device))


@dataclass(frozen=True)
class LayerStatistics:
    """All that a method is given about one matrix apart from its weights. `guided`: for each group of its rows, second moments in which a token
    counts by the loss's squared gradient at those outputs."""

    inputs: InputStatistics
    fisher: Fisher | None = None
    guided: tuple[InputStatistics, ...] = ()
