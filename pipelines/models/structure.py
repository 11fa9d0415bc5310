"""Makes a model's skeleton from its config, and finds a model's decoder blocks and the matrices in them.

Models are walked by structure, not by name. Knows transformers; not how a weight is compressed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import getsource

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ...recover.selection import decoder_blocks
from ..errors import InputError, as_input_error
from ..store.manifest import FOR_TRANSFORMERS


@dataclass(frozen=True)
class Site:
    """One matrix that can be compressed. `module` is the dotted name of the module in the model; a mixture of experts keeps all
    experts in one parameter, of which a site is one slice."""

    name: str
    module: str
    kind: str  # "linear" | "conv1d" | "expert"
    shape: tuple[int, int]  # [out, in]
    block: int | None
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False  # the parameter holds [in, out]

    def read(self, parameter: Tensor) -> Tensor:
        """The [O, I] matrix inside the parameter, as a view."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class Skipped:
    """A weight that stays as it is, with the reason in words."""

    name: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """Where the decoder is (`prefix`, e.g. "model.layers"), and what can be compressed in it."""

    prefix: str
    blocks: int
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    embeddings: Site | None = None  # the token embeddings [V, D], which no stage but quantize touches, and only if set

    def of_block(self, index: int) -> list[Site]:
        return [site for site in self.sites if site.block == index]

    @property
    def head(self) -> Site | None:
        """The output head, where it is among the sites."""
        return next((site for site in self.sites if site.block is None), None)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model with parameters on the meta device and real (computed) buffers, in eval mode."""
    for name in FOR_TRANSFORMERS:
        if hasattr(config, name):
            delattr(config, name)
    config._experts_implementation = "eager"  # one linear for each expert and its tokens: what `blocks` can watch
    with as_input_error(f"model type {config.model_type!r}: its config makes no language model"):
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
    model.config.use_cache = False
    return model.eval()


def inspect(model: nn.Module, include_head: bool = False) -> Structure:
    """Find the decoder: the longest outermost ModuleList of one class; its linears and experts are the sites."""
    prefix, blocks = find_blocks(model)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for index, block in enumerate(blocks):
        for site in _sites(block, f"{prefix}.{index}", index):
            (sites if isinstance(site, Site) else skipped).append(site)  # type: ignore[arg-type]
    if not sites:
        raise InputError(f"{type(model).__name__}: its decoder blocks hold no linear layer to compress")
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(head, nn.Linear):
        name = next(n for n, m in model.named_modules() if m is head)
        if include_head:
            sites.append(Site(name, name, "linear", (head.out_features, head.in_features), None))
        else:
            skipped.append(Skipped(name, "the output head stays as it is unless include_head is set"))
    return Structure(prefix, len(blocks), tuple(sites), tuple(skipped), _embeddings(model))


def _embeddings(model: nn.Module) -> Site | None:
    table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(table, nn.Embedding):
        return None
    name = next(n for n, m in model.named_modules() if m is table)
    return Site(name, name, "embedding", (table.num_embeddings, table.embedding_dim), None)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """InputError when there is no ModuleList of at least one block."""
    try:
        return decoder_blocks(model)
    except ValueError as error:
        raise InputError(f"{error}, so this is not a decoder-only language model") from error


def _sites(block: nn.Module, prefix: str, index: int) -> Iterator[Site | Skipped]:
    for name, module in block.named_modules():
        full = f"{prefix}.{name}"
        if isinstance(module, nn.Linear):
            yield Site(full, full, "linear", (module.out_features, module.in_features), index)
        elif isinstance(module, Conv1D):
            yield Site(full, full, "conv1d", (module.nf, module.nx), index, transposed=True)
        elif isinstance(module, nn.modules.conv._ConvNd):
            yield Skipped(f"{full}.weight", "a convolution, not a matrix product")
        else:
            for parameter, value in module.named_parameters(recurse=False):
                if value.ndim == 3:
                    yield from _experts(module, full, parameter, value, index)
                elif value.ndim == 2:
                    yield Skipped(
                        f"{full}.{parameter}", f"a matrix of {type(module).__name__}, not a linear layer (a router stays as it is)"
                    )


def _experts(module: nn.Module, full: str, parameter: str, value: Tensor, index: int) -> Iterator[Site]:
    """Fused experts [E, O, I]; a module that says `is_transposed` keeps them as [E, I, O]."""
    transposed = bool(getattr(module, "is_transposed", False))
    rows, columns = (value.shape[2], value.shape[1]) if transposed else (value.shape[1], value.shape[2])
    for expert in range(value.shape[0]):
        yield Site(f"{full}.{parameter}.{expert}", full, "expert", (rows, columns), index, parameter, expert, transposed)


def parameters_are_read(model: nn.Module, name: str) -> bool:
    """Whether the code of the module that holds this linear reads its weight or bias instead of calling it."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _leaves_read(type(model.get_submodule(owner)))


@lru_cache(maxsize=256)
def _leaves_read(owner: type) -> frozenset[str]:
    try:
        source = getsource(owner)
    except (OSError, TypeError):  # made at run time: nothing to read
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|is_)|\s+is\s)", source))


def tied_names(model: nn.Module) -> dict[str, str]:
    """State-dict names that share a parameter with an earlier name → that name."""
    seen: dict[int, str] = {}
    out: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            out[name] = seen[id(parameter)]
        else:
            seen[id(parameter)] = name
    return out


def shared_names(model: nn.Module, name: str) -> list[str]:
    """All state-dict names of one parameter, the one it is stored under first."""
    tied = tied_names(model)
    first = tied.get(name, name)
    return [first, *(copy for copy, source in tied.items() if source == first)]


def is_tied(model: nn.Module, structure: Structure) -> bool:
    """Whether the token embeddings and the output head are one matrix."""
    table, head = structure.embeddings, structure.head
    return table is not None and head is not None and f"{head.module}.weight" in shared_names(model, f"{table.module}.weight")


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a (meta) parameter or persistent buffer by a real one that needs no gradient."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
