"""Cost model of a model's forward pass: its blocks' matrices by the input they read, and the operations between the products.

The latter is counted by running one and two blocks on the meta device (`recover.activations`). Knows skeletons; no weights, no stages.
Legend: B windows at once, T tokens of a window, O out, I in, D model, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...recover.activations import Activations, Alive, forward_without_bytes, step_without_bytes
from ...recover.losses import LossName
from ..devices.rates import Work
from ..models.sizes import _input_of
from ..models.structure import Site, Structure, inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Between:
    """What happens between the products: `work` and `peak` bytes of one block, forward; `rest` is the part of the pass outside its blocks."""

    work: Work
    peak: int


@dataclass(frozen=True)
class TrainingStep:
    """A training micro-batch: `work` between the products of one block, forward and backward; `of_loss` of the loss and its chunks of
    logits; `activations` of the whole model."""

    work: Work
    of_loss: Work
    activations: Activations

    def extended(self, before: "TrainingStep", times: float) -> "TrainingStep":
        """This one and so many times what it is more than the one before."""

        def more(here: Work, there: Work) -> Work:
            return here + times * (here + -1 * there)

        mine, theirs = self.activations, before.activations
        saved, peak = (round(a + times * (a - b)) for a, b in ((mine.saved, theirs.saved), (mine.peak, theirs.peak)))
        return TrainingStep(more(self.work, before.work), more(self.of_loss, before.of_loss), Activations(saved, peak))


LARGE_BATCH = 32


class Anatomy:
    """Of the decoder: mean numbers of a block, since blocks of a model differ little."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.structure: Structure = inspect(model, include_head=True)
        self.blocks = self.structure.blocks
        table = self.structure.embeddings
        self.vocabulary, self.width = table.shape if table is not None else (0, min(s.shape[1] for s in self.structure.sites))
        self.head = self.structure.head
        self.parameters = sum(p.numel() for p in model.parameters())
        self.in_blocks = sum(p.numel() for p in model.get_submodule(self.structure.prefix).parameters())
        config = model.config.get_text_config()
        chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
        experts = max((s.expert or 0 for s in self.structure.sites), default=0) + 1
        self.active = min(1.0, chosen / experts) if chosen and experts > 1 else 1.0

    @property
    def outside(self) -> int:
        """Parameters outside the blocks."""
        return self.parameters - self.in_blocks

    @property
    def block_parameters(self) -> float:
        return self.in_blocks / self.blocks

    def products(self, sites: list[Site] | None = None) -> float:
        """Multiply-adds of a token through a block's matrices (or some of them): of experts those that it reaches."""
        result = self.sites() if sites is None else sites
        return sum(s.shape[0] * s.shape[1] * (1.0 if s.expert is None else self.active) for s in result)

    def sites(self) -> list[Site]:
        """Those of a block in the middle, whose kind is the most frequent."""
        return self.structure.of_block(self.blocks // 2)

    def inputs(self, sites: list[Site]) -> list[list[Site]]:
        """Sites grouped by the input they read: q, k and v; gate and up."""
        groups: dict[object, list[Site]] = {}
        for site in sites:
            groups.setdefault(_input_of(site) or site.name, []).append(site)
        return list(groups.values())

    def forward(self, batch: int, seq_len: int, dtype: torch.dtype) -> Between:
        """Of one block on [B, T]."""
        return _forward(self, batch, seq_len, dtype)

    def step(self, batch: int, seq_len: int, dtype: torch.dtype, checkpointing: bool, loss: LossName) -> TrainingStep:
        """ValueError where the model's code cannot be run without bytes. Everything is linear in the batch, so a large one is not run."""
        if batch <= LARGE_BATCH:
            return _step(self, batch, seq_len, dtype, checkpointing, loss)
        half, whole = (_step(self, size, seq_len, dtype, checkpointing, loss) for size in (LARGE_BATCH // 2, LARGE_BATCH))
        return whole.extended(half, (batch - LARGE_BATCH) / (LARGE_BATCH // 2))

    def cut(self, blocks: int) -> "PreTrainedModel":
        """A copy of the skeleton with so many blocks; the others are not copied."""
        prefix, layers = self.structure.prefix, self.model.get_submodule(self.structure.prefix)
        self.model.set_submodule(prefix, nn.ModuleList(list(layers.children())[:blocks]))
        try:
            model = copy.deepcopy(self.model)
        finally:
            self.model.set_submodule(prefix, layers)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.num_hidden_layers = blocks
        return model


@lru_cache(maxsize=64)
def _forward(anatomy: Anatomy, batch: int, seq_len: int, dtype: torch.dtype) -> Between:
    one, two = (forward_without_bytes(anatomy.cut(blocks), batch, seq_len, dtype, Counted) for blocks in _few(anatomy))
    return Between(two.work() + -1 * one.work(), one.peak)


@lru_cache(maxsize=64)
def _step(anatomy: Anatomy, batch: int, seq_len: int, dtype: torch.dtype, checkpointing: bool, loss: LossName) -> TrainingStep:
    result = [step_without_bytes(anatomy.cut(n), batch, seq_len, dtype, checkpointing, loss, Counted) for n in _few(anatomy)]
    (one, seen), (two, also) = result
    block = also.work() + -1 * seen.work()
    more = anatomy.blocks - 1
    whole = Activations(one.saved + more * (two.saved - one.saved), one.peak + more * (two.peak - one.peak))
    return TrainingStep(block, seen.work() + -1 * block, whole)


def _few(anatomy: Anatomy) -> tuple[int, int]:
    return (1, 2) if anatomy.blocks > 1 else (1, 1)


UNCOUNTED = frozenset({"aten::empty", "aten::new_empty", "aten::empty_like", "aten::detach", "aten::_local_scalar_dense"})
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


class Counted(Alive):
    """Counts what operations do as well: bytes that they read and write, products apart."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.passes = self.calls = 0
        self.products: dict[torch.dtype, float] = {}

    def work(self) -> Work:
        return Work(dict(self.products), passes=self.passes, calls=self.calls)

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        assert isinstance(func, torch._ops.OpOverload)
        name = func._schema.name
        if func.is_view or name in UNCOUNTED:
            return out
        self.calls += 1
        read, made = ([t for t in tree_leaves(some) if isinstance(t, Tensor)] for some in ((args, kwargs), out))
        if name in PRODUCTS:
            self.products[made[0].dtype] = self.products.get(made[0].dtype, 0.0) + made[0].numel() * read[-1].shape[-2]
        else:
            self.passes += sum(t.numel() * t.element_size() for t in (*read, *made))
        return out
