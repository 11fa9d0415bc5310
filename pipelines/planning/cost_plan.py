"""Inputs and result of a stage's predicted costs: `CostPlan`, which all stages of a run share, and `Needs`.

Knows the model's anatomy, the recipe, a device and a dtype; no stage.
Legend: N windows, T tokens, D model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..devices.rates import Work
from ..evaluation.perplexity import TOKENS_AT_ONCE, batches
from ..models.structure import Site
from ..ranks.exchange import SLOTS
from ..recipes.recipe import Recipe
from .anatomy import Anatomy
from .division import Divided, Exchange

OPENED = Work(calls=50_000)
"""A model opened for running: its modules made, its structure inspected, a block tried."""
DENSE = 14.0
"""Reads and writes of a weight in float32 while a record is made dense, counted on 3- and 4-bit codes."""
ATTENTION_SHARE = 2.0
"""Multiply-adds of fused attention run at this share of the seconds of plain products of as many."""


@dataclass(frozen=True)
class Needs:
    """`device`: bytes of tensors on the run's device; `host`: other bytes of this process (on a CPU both are one memory); `hidden`: bytes of
    hidden states, which lie on the device, in host memory or in files, as there is room; `replayed` what a block keeps between its groups, where
    the device has room. Of `work`, all that one process does: `divided` is what
    several ranks share, `alone` names what is left, which every rank repeats or waits for; `sent` is what goes from rank to rank. Of `device` the bytes `parted` lie in parts on the ranks."""

    work: Work
    device: float
    host: float
    hidden: float = 0.0
    divided: tuple[Divided, ...] = ()
    alone: Mapping[str, Work] = field(default_factory=dict)
    sent: tuple[Exchange, ...] = ()
    parted: float = 0.0
    replayed: float = 0.0

    def most(self, other: "Needs") -> "Needs":
        """Both one after the other."""
        device, host, hidden = max(self.device, other.device), max(self.host, other.host), max(self.hidden, other.hidden)
        alone = {name: self.alone.get(name, Work()) + other.alone.get(name, Work()) for name in {**self.alone, **other.alone}}
        return Needs(
            self.work + other.work,
            device,
            host,
            hidden,
            self.divided + other.divided,
            alone,
            self.sent + other.sent,
            max(self.parted, other.parted),
            max(self.replayed, other.replayed),
        )


@dataclass(frozen=True)
class CostPlan:
    """What all stages of a run share: the model, the recipe, the device and dtype of forward passes, bytes of a stored number."""

    anatomy: Anatomy
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    element: float

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def outside_bytes(self) -> float:
        return self.anatomy.outside * self.itemsize

    @property
    def block_bytes(self) -> float:
        return self.anatomy.block_parameters * self.itemsize

    def hidden_bytes(self, tokens: float) -> float:
        return tokens * self.anatomy.width * self.itemsize

    def batch(self, seq_len: int) -> int:
        return max(1, TOKENS_AT_ONCE // seq_len)

    def batches(self, windows: int, seq_len: int) -> list[int]:
        """Windows of each batch."""
        return [part.stop - part.start for part in batches(windows, seq_len)]

    def pass_of(self, tokens: float, seq_len: int, sites: list[Site] | None = None) -> Work:
        """Tokens through one block, or through its products with some matrices alone."""
        batch = self.batch(seq_len)
        between = self.anatomy.forward(batch, seq_len, self.dtype)
        attention = ATTENTION_SHARE * tokens * seq_len * self.anatomy.width
        products = Work({self.dtype: tokens * self.anatomy.products(sites) + attention})
        return products + between.work * (tokens / (batch * seq_len))

    def running_bytes(self, windows: int, seq_len: int) -> float:
        """What one block holds in addition to its weights and its input while a batch runs."""
        return self.anatomy.forward(min(windows, self.batch(seq_len)), seq_len, self.dtype).peak

    def loaded(self, records: bool) -> Work:
        """One block read, and made dense where it holds records."""
        count = self.anatomy.block_parameters
        return Work(passes=count * (4 * DENSE if records else 2 * self.element + self.itemsize), calls=300)

    def slots(self, windows: int, seq_len: int) -> list[float]:
        """Windows of each slot."""
        totals: dict[int, float] = {}
        for number, count in enumerate(self.batches(windows, seq_len)):
            totals[number % SLOTS] = totals.get(number % SLOTS, 0.0) + count
        return list(totals.values())
