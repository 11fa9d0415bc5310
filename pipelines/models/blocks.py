"""A model run block by block: one decoder block in memory, hidden states carried from block to block.

Everything before the blocks (embedding, masks, rotary tables) and after them (norm, head) is the model's own code: the forward
pass runs with the blocks replaced by stand-ins that record what they are called with, or hand on hidden states computed elsewhere.
Knows artifacts and modules; not compression methods, not metrics.
Legend: N windows, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PretrainedConfig

from ...compress.weights import DenseWeight, StoredWeight
from ...recover.experts import put_back
from ...recover.extra_modules import Tokens, cache_argument
from ...recover.student import forward_of, whole_windows
from ..errors import InputError
from ..store.artifact import Artifact
from .reading import BlockReader, BlockTensors
from .rounded_inputs import raw_inputs, round_expert_inputs, round_inputs
from .source import load_config
from .structure import Site, Structure, inspect, set_parameter, skeleton, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Binder(Protocol):
    """Replaces modules by others that run their records. `experts`: fused experts as well, which are dense otherwise."""

    @property
    def experts(self) -> bool: ...

    def __call__(self, model: nn.Module, prefix: str, records: dict[str, StoredWeight]) -> None:
        """A block's linears, by name."""
        ...

    def tables(self, model: "PreTrainedModel", records: dict[str, StoredWeight]) -> None:
        """The token embeddings and the head, by the name of their parameter; those it leaves get their dense matrix."""
        ...


@dataclass
class StreamedModel:
    """An artifact opened for running. `bind` (default: dense effective weights) decides how records become modules.

    Extra modules run with it: bottlenecks hang on a block while it is loaded; virtual tokens enter in `embed` and leave
    behind the last block (a prompt), or stand before every attention (a prefix). `virtual=False` runs it without its tokens. A `reader` that
    keeps its blocks may be shared with whoever else needs them. `config` stands for the artifact's own.
    """

    artifact: Artifact
    device: torch.device
    dtype: torch.dtype = torch.float32
    bind: Binder | None = None
    virtual: bool = True
    reader: BlockReader = None  # type: ignore[assignment]
    config: PretrainedConfig | None = None
    model: Any = field(init=False)
    structure: Structure = field(init=False)
    _calls: dict[tuple[int, int], list[tuple[tuple[object, ...], dict[str, object]]]] = field(init=False, default_factory=dict)
    _tuple_size: int = field(init=False, default=-1)
    _plain: dict[int, dict[str, nn.Module]] = field(init=False, default_factory=dict)
    _fused: dict[int, dict[str, nn.Parameter]] = field(init=False, default_factory=dict)
    _hooks: dict[int, list[RemovableHandle]] = field(init=False, default_factory=dict)
    tokens: Tokens | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.reader = self.reader or BlockReader(self.artifact)
        self.model = skeleton(self.config or load_config(self.artifact.directory))
        self.structure = inspect(self.model, include_head=True)
        self._tied = tied_names(self.model)
        tables = self._tables()
        for name, tensor in self.outside_blocks(tables).items():
            set_parameter(self.model, name, tensor.to(self.device, self._running(tensor)))
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            set_parameter(self.model, name, buffer.to(self.device))
        if self.bind is not None and tables:
            self.bind.tables(self.model, tables)
        heads = [s for s in self.structure.sites if s.block is None and "activations" in self.artifact.linears.get(s.name, ())]
        for head in heads if self.bind is None else ():
            round_inputs(self.model.get_submodule(head.module), self.artifact.stored(head.name).to(self.device))
        if self.virtual:
            result = [t for extra in self.artifact.extra_modules if (t := extra.virtual()) is not None]
            self.tokens = result[-1].to(self.device, self.dtype) if result else None

    @property
    def prompt_length(self) -> int:
        """How many positions of the hidden states between `embed` and the last block are virtual tokens."""
        return self.tokens.count if self.tokens is not None and self.tokens.kind == "prompt" else 0

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.structure.prefix)

    def _running(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def outside_blocks(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Parameters outside the blocks, tied copies left out, records made dense."""
        blocks = f"{self.structure.prefix}."
        names = [n for n in self.model.state_dict() if not n.startswith(blocks) and n not in self._tied]
        return {n: self._parameter(n) for n in names if n not in without}

    def _tables(self) -> dict[str, StoredWeight]:
        """Parameter → record of the token embeddings and the head, for a binder to place; plain ones as dense records."""
        if self.bind is None or not self.artifact.linears:
            return {}
        ends = [m for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings()) if m is not None]
        names = [n for n, p in self.model.named_parameters() if any(p is m.weight for m in ends)]
        return {n: self._record(n) or StoredWeight(DenseWeight(self._parameter(n))) for n in names}

    def _record(self, name: str) -> StoredWeight | None:
        """The record of a parameter, under whichever of its tied names it is stored."""
        shared = [name, *(copy for copy, first in self._tied.items() if first == name)]
        linear = next((n.removesuffix(".weight") for n in shared if n.removesuffix(".weight") in self.artifact.linears), None)
        return None if linear is None else self.artifact.stored(linear)

    def _parameter(self, name: str) -> Tensor:
        record = self._record(name)
        if record is not None:
            return record.dense()
        if name not in self.artifact.index:
            raise InputError(
                f"{self.artifact.directory}: no tensor {name!r}, which {self.model.config.model_type} needs; the checkpoint is incomplete"
            )
        return self.artifact.tensor(name)

    def prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.structure.prefix}.{index}."

    def walk(self, backward: bool = False, first: int = 0) -> Iterator[int]:
        """Each block in turn from the `first` on, from the last one to the first if `backward`, loaded while the caller has it; the next one is read
        meanwhile."""
        for index in reversed(range(self.structure.blocks)) if backward else range(first, self.structure.blocks):
            self.load_block(index)
            self.expect(index - 1 if backward else index + 1)
            yield index
            self.unload_block(index)

    def expect(self, index: int) -> None:
        """Begin to read a block that will be loaded; before the first and behind the last one there is none."""
        if 0 <= index < self.structure.blocks:
            self.reader.expect(self.prefix(index))

    def load_block(self, index: int, source: Artifact | None = None, bind: Binder | None = None) -> nn.Module:
        """Block `index` with real parameters: plain tensors as stored, records as `bind` says. Another `source` may hold the block (a part
        just written), another `bind` may place it."""
        bind, block, prefix = bind or self.bind, self.layers[index], f"{self.structure.prefix}.{index}"
        result = self.reader.block(f"{prefix}.") if source is None else BlockTensors.read(source, f"{prefix}.")
        stored = {s.name: result.stored(s.name) for s in self.structure.of_block(index) if s.name in result.linears}
        compressed = {s.name: s for s in self.structure.of_block(index) if s.name in stored}
        plain = {f"{s.module}.{s.parameter}" for s in compressed.values()}
        experts = {f"{s.module}.{s.parameter}" for s in self.structure.of_block(index) if s.expert is not None}
        tensors = result.tensors
        for name in block.state_dict():
            full = f"{prefix}.{name}"
            if full not in plain:
                if full not in tensors:
                    raise InputError(f"{result.artifact.directory}: no tensor {full!r}; the checkpoint is incomplete")
                own = self.reader.keeps and full in experts  # `put` writes into them
                set_parameter(self.model, full, tensors[full].to(self.device, self._running(tensors[full]), copy=own))
        linears = {s.module for s in self.structure.of_block(index) if s.expert is None}
        for name, tensor in tensors.items():  # biases that recovery created where the architecture has none
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and owner in linears and self.model.get_submodule(owner).bias is None:
                self.model.get_submodule(owner).bias = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
        for name, record in stored.items():
            if bind is None or (compressed[name].expert is not None and not bind.experts):
                self.put(compressed[name], record)
        if bind is not None:
            self._plain[index] = {name: self.model.get_submodule(name) for name in linears}
            self._fused[index] = {name: _without_bytes(self.model.get_parameter(name)) for name in experts}
            bind(self.model, prefix, stored)
            self._forget_replaced(index)
        self._hooks[index] = [
            h for extra in self.artifact.extra_modules for h in extra.hang(self.model, f"{prefix}.", self.device, self.dtype)
        ]
        return block

    def _forget_replaced(self, index: int) -> None:
        """A linear that a binder replaced gives its weight back: it comes home without one."""
        for name, module in self._plain[index].items():
            if self.model.get_submodule(name) is not module:
                _to_meta(module)

    def put(self, site: Site, record: StoredWeight) -> None:
        """Make a site compute what `record` says: its effective weight, and its activation rounding if it has one."""
        module = self.model.get_submodule(site.module)
        record = record.to(self.device)
        dense = record.dense(self.dtype)
        if site.expert is None:
            set_parameter(self.model, f"{site.module}.{site.parameter}", dense.T.contiguous() if site.transposed else dense)
            round_inputs(module, record)
            return
        parameter = module._parameters[site.parameter]
        if parameter is None or parameter.is_meta:
            shape = self.model.get_submodule(site.module)._parameters[site.parameter].shape  # type: ignore[union-attr]
            set_parameter(self.model, f"{site.module}.{site.parameter}", torch.empty(shape, device=self.device, dtype=self.dtype))
            parameter = module._parameters[site.parameter]
        assert parameter is not None
        site.read(parameter.data).copy_(dense)
        assert site.expert is not None
        round_expert_inputs(module, parameter.data[site.expert], record)

    def unload_block(self, index: int) -> None:
        """Give the block's memory back; what a reader keeps stays."""
        for handle in self._hooks.pop(index, []):
            handle.remove()
        for name, module in self._plain.pop(index, {}).items():
            self.model.set_submodule(name, module)
        for name, parameter in self._fused.pop(index, {}).items():
            owner, _, leaf = name.rpartition(".")
            put_back(self.model.get_submodule(owner), leaf, parameter)
        _to_meta(self.layers[index])

    def matrix(self, site: Site) -> Tensor:
        """The float32 [O, I] matrix a loaded site holds now."""
        parameter = self.model.get_submodule(site.module)._parameters[site.parameter]
        return site.read(parameter.data).float()

    # -- running -------------------------------------------------------------------------------------------------------------

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Hidden states [N, T, D] that enter the first block, [N, P + T, D] with a prompt; records what every block is called with at
        this shape."""
        with torch.no_grad():
            entered, calls = self._entering(ids_NT)
        self._calls[entered.shape[0], entered.shape[1]] = calls
        return entered

    def embed_with_gradients(self, ids_NT: Tensor) -> Tensor:
        """The same hidden states, and how they came about, for whoever hooks the token embeddings; nothing is recorded."""
        return self._entering(ids_NT)[0]

    def _entering(self, ids_NT: Tensor) -> tuple[Tensor, list[tuple[tuple[object, ...], dict[str, object]]]]:
        """What enters the first block, and the other arguments of every block."""
        ids = ids_NT.to(self.device)
        calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
        entered: list[Tensor] = []

        def record(index: int, hidden: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
            entered.append(hidden)
            calls.append((args, kwargs))
            if index == self.structure.blocks - 1:
                raise _Stop
            return hidden

        with self._stand_ins(record):
            self._forward_until_stop(**self._arguments(ids))
        return entered[0], calls

    def _arguments(self, ids_NT: Tensor) -> dict[str, object]:
        """What the model is called with: the text, and its virtual tokens."""
        count, length = ids_NT.shape
        if self.tokens is None:
            return {"input_ids": ids_NT, "use_cache": False}
        if self.tokens.kind == "prompt":
            embedded = self.model.get_input_embeddings()(ids_NT)
            return {"inputs_embeds": torch.cat((self.tokens.embeddings(count).to(embedded), embedded), 1), "use_cache": False}
        seen = torch.ones(count, self.tokens.count + length, dtype=torch.long, device=self.device)
        cache = {cache_argument(self.model): self.tokens.cache(self.model.config, count)}
        return {"input_ids": ids_NT, "attention_mask": seen, "use_cache": True, **cache}

    def run_block(self, index: int, hidden_NTD: Tensor) -> Tensor:
        """One loaded block on hidden states of a shape that `embed` has seen; behind the last one a prompt is cut off."""
        args, kwargs = self.call_of(index, hidden_NTD)
        out = self.layers[index](hidden_NTD, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return out[:, self.prompt_length :] if index == self.structure.blocks - 1 else out

    def call_of(self, index: int, hidden_NTD: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments of block `index` other than hidden states of this shape."""
        shape = (hidden_NTD.shape[0], hidden_NTD.shape[1])
        if shape not in self._calls:
            self.embed(torch.zeros(shape[0], shape[1] - self.prompt_length, dtype=torch.long))
        args, kwargs = self._calls[shape][index]
        if self.tokens is None or self.tokens.kind == "prompt":
            return args, kwargs
        fresh = self.tokens.cache(self.model.config, shape[0])  # the block grows it
        return tuple(_instead(a, fresh) for a in args), {k: _instead(v, fresh) for k, v in kwargs.items()}

    def logits(self, hidden_NTD: Tensor) -> Tensor:
        """[N, T, V] from hidden states that leave the last block: the model's own norm, head and soft caps, token by token."""
        rows = hidden_NTD.reshape(-1, 1, hidden_NTD.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=self.device)
        with whole_windows(), self._stand_ins(lambda index, hidden, args, kwargs: rows):
            return self.model(ids, use_cache=False).logits.view(*hidden_NTD.shape[:2], -1)

    def _forward_until_stop(self, **arguments: object) -> None:
        try:
            with whole_windows():
                self.model(**arguments)
        except _Stop:
            return
        raise InputError(
            f"{type(self.model).__name__}: its forward pass does not call its blocks in order; this architecture is not supported"
        )

    def _probe(self) -> None:
        """Learn whether a block returns a tensor or a tuple, by running the first one on a few tokens. InputError when a token sees the
        one after it: this is then no language model that a perplexity means something for."""
        block = self.load_block(0)
        plain = block.forward
        result: list[int] = []
        sees: list[bool] = []

        def forward(*args: object, **kwargs: object) -> NoReturn:
            out = plain(*args, **kwargs)
            result.append(len(out) if isinstance(out, tuple) else 0)
            sees.append(_looks_ahead(out[0] if isinstance(out, tuple) else out))
            raise _Stop

        try:
            with torch.no_grad(), forward_of(block, forward):
                ids = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], device=self.device)
                self._forward_until_stop(input_ids=ids, use_cache=False)
        finally:
            self.unload_block(0)
        if sees[0]:
            raise InputError(f"{type(self.model).__name__}: its tokens see those after them, so this is not a causal language model")
        self._tuple_size = result[0]

    @contextmanager
    def _stand_ins(self, stand_in: Callable[[int, Tensor, tuple[object, ...], dict[str, object]], Tensor]) -> Iterator[None]:
        if self._tuple_size < 0:
            self._probe()

        def replace(index: int) -> Callable[..., Tensor | tuple[Tensor | None, ...]]:
            def forward(*args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
                hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
                assert isinstance(hidden, Tensor)
                out = stand_in(index, hidden, tuple(rest), kwargs)
                return (out, *[None] * (self._tuple_size - 1)) if self._tuple_size else out

            return forward

        with ExitStack() as stack:
            for index, block in enumerate(self.layers):
                stack.enter_context(forward_of(block, replace(index)))
            yield


def _instead(value: object, cache: object) -> object:
    return cache if isinstance(value, Cache) else value


def _looks_ahead(out_2TD: Tensor) -> bool:
    """Whether the outputs of two texts that differ in their last token differ before it."""
    one, other = out_2TD[:, :-1].float()
    slack = 64 * torch.finfo(out_2TD.dtype).eps * float(one.abs().max())
    return bool(((one - other).abs() > slack).any())


class _Stop(Exception):
    """Ends a forward pass once everything wanted has been recorded."""


def _to_meta(block: nn.Module) -> None:
    module: object
    for module in block.modules():
        raw_inputs(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _without_bytes(parameter)


def _without_bytes(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
