"""Collects input statistics of every matrix while a model runs block by block, experts of a mixture included, and groups matrices by input.

Knows modules and their inputs; not what the statistics are for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...compress.statistics import InputStatistics
from ...recover.student import forward_of
from .blocks import StreamedModel
from .hidden import HiddenStates
from .replay import Replay
from .sharding import BatchShare
from .slot_sums import SlotSums
from .structure import Site


@contextmanager
def collecting(
    model: StreamedModel,
    sites: list[Site],
    needs: frozenset[str],
    statistics: dict[str, InputStatistics],
    dense_inputs: Mapping[str, list[Tensor]] | None = None,
) -> Iterator[Callable[[], None]]:
    """While open, every call of a site's module adds its input to `statistics[site.name]`; sites that are handed the very same
    tensor (q, k and v) share one accumulator. `dense_inputs` (site → inputs in call order) pairs with the dense model's. What is yielded
    empties `statistics` for those of the next slot."""
    modules = {site.name: module for site in sites if (module := _module_of(model, site)) is not None}
    last: list[tuple[Tensor, str]] = []
    handles = []

    def hook(site: Site) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            leader = next((name for tensor, name in last if tensor is x), None)
            if leader is not None:
                statistics[site.name] = statistics[leader]
                return
            del last[:-3]
            last.append((x, site.name))
            if site.name not in statistics:
                statistics[site.name] = InputStatistics(site.shape[1], needs, x.device)
            paired = dense_inputs[site.name].pop(0) if dense_inputs is not None else None
            statistics[site.name].update(x, paired)

        return before

    for site in sites:
        if site.name in modules:
            handles.append(modules[site.name].register_forward_pre_hook(hook(site)))

    def begin() -> None:
        last.clear()
        statistics.clear()
        idle()

    def idle() -> None:
        for site in sites:
            if site.expert is not None:
                statistics.setdefault(
                    site.name, InputStatistics(site.shape[1], needs, model.device)
                )  # takes no memory before a token comes

    idle()
    experts = [site for site in sites if site.name not in modules]
    paired = dense_inputs is not None

    def of_expert(site: Site, x: Tensor) -> None:
        """The tokens that reach an expert differ from the dense model's, so it is paired with itself: nothing to correct toward."""
        statistics[site.name].update(x, x if paired else None)

    try:
        with _ExpertInputs(model, experts, of_expert) if experts else nullcontext():
            yield begin
    finally:
        for handle in handles:
            handle.remove()


def _module_of(model: StreamedModel, site: Site) -> nn.Module | None:
    """What multiplies by a site's matrix; None for a slice of a fused parameter that no linear took the place of."""
    if site.expert is None:
        return model.model.get_submodule(site.module)
    return model.model.get_submodule(site.name) if site.parameter in model.model.get_submodule(site.module)._modules else None


class Watch(Protocol):
    """What else looks at a walk over batches: told which one comes, by its place, and that a slot's are through."""

    def enter(self, place: int) -> None: ...

    def end_slot(self) -> None: ...


def gather(
    model: StreamedModel,
    hidden: HiddenStates,
    sites: list[Site],
    needs: frozenset[str],
    run: Callable[[int, Tensor], object],
    share: BatchShare | None = None,
    dense_inputs: Mapping[str, list[Tensor]] | None = None,
    watch: Watch | None = None,
) -> dict[str, InputStatistics]:
    """By site, what enters it while `run(place, batch)` takes every batch of the hidden states, slot after slot; sums are those of
    the slots in their order. `hidden` are this rank's `share` of all (None: all there are), the sums are of all ranks. InputError for sites
    that read one tensor in one slot and several in another."""
    rounds = (share := share or BatchShare(len(hidden))).rounds
    batches = hidden.at([place for places in rounds for place in places])
    sums, result = SlotSums(sites, needs, model.device, share.ranks), dict[str, InputStatistics]()
    with collecting(model, sites, needs, result, dense_inputs) as begin:
        for places in rounds:
            for place in places:
                if watch is not None:
                    watch.enter(place)
                run(place, next(batches))
            sums.add(result)
            if watch is not None:
                watch.end_slot()
            begin()
    return sums.total()


@dataclass(frozen=True)
class DenseInputs:
    """The dense model's inputs of the same text (site → inputs in call order), and what runs it: called with the place of a batch, before
    that batch enters the compressed block."""

    inputs: Mapping[str, list[Tensor]]
    run: Callable[[int], object]


@dataclass(frozen=True)
class Alongside:
    """What else goes on while a block's inputs are collected. `replay`: of a block that runs for each of its groups, whose sites read one tensor."""

    dense: DenseInputs | None = None
    watch: Watch | None = None
    replay: Replay | None = None


def collect(
    model: StreamedModel,
    index: int,
    hidden: HiddenStates,
    sites: list[Site],
    needs: frozenset[str],
    share: BatchShare | None = None,
    alongside: Alongside = Alongside(),
) -> dict[str, InputStatistics]:
    """`gather` from a loaded block. The first batch shows which input
    comes last; the others run no further than that, so the product behind it is left out. Experts run to the end."""
    dense, replay = alongside.dense, alongside.replay
    modules = {site.module: model.model.get_submodule(site.module) for site in sites}
    called: list[str] = []
    handles = [m.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, m in modules.items()]

    def run(place: int, hidden_NTD: Tensor) -> None:
        if dense is not None:
            dense.run(place)
        with suppress(_Enough), nullcontext() if replay is None else replay.at(place):
            model.run_block(index, hidden_NTD)
        if place == 0:
            while handles:
                handles.pop().remove()
            if called and sorted(called) == sorted(modules) and not any(site.expert is not None for site in sites):
                handles.append(modules[called[-1]].register_forward_pre_hook(_stop))
                if replay is not None:
                    unread.enter_context(_without_products([(modules[s.module], s.shape[0]) for s in sites if s.module != called[-1]]))

    unread = ExitStack()
    try:
        return gather(model, hidden, sites, needs, run, share, None if dense is None else dense.inputs, alongside.watch)
    finally:
        unread.close()
        for handle in handles:
            handle.remove()


@contextmanager
def _without_products(modules: Sequence[tuple[nn.Module, int]]) -> Iterator[None]:
    """Linears, with their widths, whose outputs nothing that counts reads: zeros. They read one tensor, and the last of them ends the run."""

    with ExitStack() as stack:
        for module, width in modules:
            stack.enter_context(forward_of(module, lambda x, width=width: x.new_zeros(*x.shape[:-1], width)))
        yield


def collect_head(
    model: StreamedModel,
    hidden: HiddenStates,
    site: Site,
    needs: frozenset[str],
    share: BatchShare | None = None,
    dense: DenseInputs | None = None,
) -> InputStatistics | None:
    """The same of the output head, from hidden states that leave the last block, window by window; its product is left out."""

    def run(place: int, hidden_NTD: Tensor) -> None:
        if dense is not None:
            dense.run(place)
        through_head(model, site, hidden_NTD)

    return gather(model, hidden, [site], needs, run, share, None if dense is None else dense.inputs).get(site.name)


def through_head(model: StreamedModel, site: Site, hidden_NTD: Tensor) -> None:
    """As far as the head, whose logits are too many for all windows at once: they are left out."""
    handle = model.model.get_submodule(site.module).register_forward_pre_hook(_stop)
    try:
        for window_1TD in hidden_NTD.split(1):
            with suppress(_Enough):
                model.logits(window_1TD)
    finally:
        handle.remove()


@contextmanager
def dense_inputs_of(model: StreamedModel, sites: list[Site]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, every call of a site's module in the dense model adds its input under the site's name; experts are left out."""
    out: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    handles = [
        model.model.get_submodule(site.module).register_forward_pre_hook(lambda m, args, name=site.name: out[name].append(args[0]))
        for site in sites
        if site.expert is None
    ]
    try:
        yield out
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Ends a block's forward pass once every wanted input has been seen."""


def _stop(*_: object) -> None:
    raise _Enough


def input_groups(model: StreamedModel, index: int, sites: list[Site], hidden_NTD: Tensor) -> list[list[Site]]:
    """The sites of a loaded block in the order in which it calls them, those that read the very same tensor grouped (q, k, v → o →
    gate, up → down). All experts of one parameter count as one; what no token reaches comes last."""
    groups: list[list[Site]] = []
    inputs: list[Tensor | None] = []
    parameters: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.expert is not None:
            parameters.setdefault((site.module, site.parameter), []).append(site)

    def called(site: Site, x: Tensor) -> None:
        place = next((i for i, tensor in enumerate(inputs) if tensor is x), None)
        if place is None:
            groups.append([site])
            inputs.append(x)
        elif site not in groups[place]:
            groups[place].append(site)

    def expert_called(site: Site, x: Tensor) -> None:
        if group := parameters.pop((site.module, site.parameter), None):
            groups.append(group)
            inputs.append(None)

    modules = [(model.model.get_submodule(site.module), site) for site in sites if site.expert is None]
    handles = [m.register_forward_pre_hook(lambda _, args, site=site: called(site, args[0])) for m, site in modules]
    try:
        with _ExpertInputs(model, [s for s in sites if s.expert is not None], expert_called) if parameters else nullcontext():
            model.run_block(index, hidden_NTD)
    finally:
        for handle in handles:
            handle.remove()
    idle = [site for site in sites if not any(site in group for group in groups)]
    return [*groups, *([idle] if idle else [])]


class _ExpertInputs(torch.overrides.TorchFunctionMode):
    """Sees every `linear` whose weight is a slice of a fused experts parameter, and hands its site and its input to `seen`.

    Works with the `eager` experts implementation of transformers, which calls one linear for each expert that a token reached.
    """

    def __init__(self, model: StreamedModel, sites: list[Site], seen: Callable[[Site, Tensor], None]):
        super().__init__()
        self.seen = seen
        self.slices: dict[int, Site] = {}
        for site in sites:
            parameter = model.model.get_submodule(site.module)._parameters[site.parameter]
            self.slices[parameter[site.expert].data_ptr()] = site

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func is nn.functional.linear and isinstance(x := args[0], Tensor) and isinstance(args[1], Tensor):
            site = self.slices.get(args[1].data_ptr())
            if site is not None and len(x):
                self.seen(site, x)
        return func(*args, **(kwargs or {}))
