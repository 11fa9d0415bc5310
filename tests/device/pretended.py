"""A CUDA device on a machine that has none: pretended cuda:0, whose memory is the host's and whose arithmetic is the CPU's.

    with pretended_cuda(total_memory=1 << 30, capability=(7, 5)) as card: ...
    python tests/device/pretended.py [--memory-gb 24] [--capability 7.5] bitmend.pipelines.cli run compress_and_recover -m MODEL

What is sent to "cuda" becomes an `OnCard`: a tensor that says it is on cuda:0 and that every operator, in forward and in backward, refuses
with a tensor of the CPU, by the operator's name. Card and host share no memory, no generator and no `.numpy()`. The card counts the bytes
of living tensors, raises OutOfMemoryError above `total_memory`, and with deterministic algorithms on refuses what CUDA does.

It cannot show what an operator computes on a card, nor races, streams, graphs (which repeat nothing here), alignment or speed: no time taken
here means anything.
Triton kernels run in Triton's interpreter: TRITON_INTERPRET=1 before anything imports triton.
"""

import argparse
import contextlib
import functools
import importlib
import os
import runpy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PLAIN_TO = torch.Tensor.to
ANY_DEVICE = ("_to_copy", "copy_", "copy", "_foreach_copy_", "lift_fresh", "_local_scalar_dense", "set_data", "set_")
"""Operators that move between devices."""
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
"""Operators whose indices, their second argument, may stay on the CPU."""
NO_LONE_NUMBERS = ("cat", "stack", "mm", "bmm", "addmm", "dot", "mv", "embedding")
"""Operators that take no 0-dimensional tensor of the CPU together with those of the card; elementwise ones do."""
NOT_DETERMINISTIC = (
    "kthvalue", "put_", "histc", "put", "median.dim", "nanmedian.dim", "nll_loss2d_forward", "nll_loss2d_backward", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "max_unpool2d",
    "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "avg_pool3d_backward",
    "upsample_trilinear3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "_ctc_loss_backward",
)  # fmt: skip
"""What `torch.use_deterministic_algorithms` documents as raising on CUDA whatever its arguments; the rest is in `deterministic`."""
COUNTED = 1024
"""Smaller tensors are not counted: what a column of a matrix costs would take longer to count than to compute."""
CUBLAS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot")


def where_told(make: Callable[..., Any]) -> Callable[..., Any]:
    """torch.zeros_like, Tensor.new_zeros and their like, where a device may be named."""

    @functools.wraps(make)
    def made(like: torch.Tensor, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if like.is_meta and device is not None:
            return make(like, *args, device=device, **kwargs)
        return make(like if device is None else to(like.detach(), device), *args, **kwargs)

    return made


class OnCard(torch.Tensor):
    """A tensor of the pretended card; made by `put`, left by `.cpu()` and `.to("cpu")`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    data = property(lambda self: self.detach(), lambda self, other: torch.Tensor.data.__set__(self, other))  # type: ignore[attr-defined]

    def get_device(self) -> int:
        return 0

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(self, to_card=False)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.cpu()!r} on cuda:0"

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def new_tensor(self, data: Any, *, device: Any = CUDA, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, device=device, **kwargs)

    new_empty, new_zeros, new_ones, new_full = (
        where_told(getattr(torch.Tensor, f"new_{kind}")) for kind in ("empty", "zeros", "ones", "full")
    )

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnCard":
        return memo.setdefault(id(self), put(self.detach().clone()).requires_grad_(self.requires_grad))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return met(func, args, kwargs or {})


class Below(TorchDispatchMode):
    """Under autograd, in every thread: factories that are given device="cuda", and what meets an `OnCard`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap what follows, at twice its price
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types or func is MOVE or (kwargs and ("device" in kwargs or "generator" in kwargs)):
            return met(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


# -- one operator ----------------------------------------------------------------------------------------------------------------


class Traits:
    """What is asked of an operator at every call, read once from its schema."""

    def __init__(self, func: Any) -> None:
        self.name, _, overload = func.name().removeprefix("aten::").partition(".")
        self.any_device, self.indexing = self.name in ANY_DEVICE, self.name in INDEXING
        self.lone_numbers = self.name not in NO_LONE_NUMBERS
        aliases = [r.alias_info for r in func._schema.returns]
        self.in_place = any(a is not None and a.is_write for a in aliases) or func._schema.is_mutable
        self.view = bool(aliases) and all(a is not None for a in aliases)
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.refused = self.name in NOT_DETERMINISTIC or f"{self.name}.{overload}" in NOT_DETERMINISTIC
        self.sometimes = self.name in ("cumsum", "cumsum_", "bincount", "scatter_reduce", "scatter_reduce_", *CUBLAS)


traits = functools.cache(Traits)


MOVES = torch.library.Library("pretended", "DEF")
MOVES.define("move(Tensor tensor, bool to_card) -> Tensor")
MOVE = torch.ops.pretended.move.default  # so that a mode above this one sees what goes from one device to the other


def met(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU in the card's name. RuntimeError for mixed devices, and as CUDA's where it is not deterministic."""
    if func is MOVE:
        return sent(*args)
    of, tensors = traits(func), flat(args)
    if kwargs:
        tensors += flat(kwargs.values())
    on_card = [isinstance(t, OnCard) for t in tensors]
    here = True in on_card
    if here and False in on_card and not of.any_device:
        refuse_mixture(func, of, args, tensors)
    device = kwargs.get("device")
    if device is not None and device.type == "cuda":
        here, kwargs = True, kwargs | {"device": CPU}
    elif device is not None and device.type != "cpu":  # meta; autograd's own calls name the CPU, where it sees the memory
        here = False
    elif of.name == "_to_copy":
        here = isinstance(args[0], OnCard)
    if here and (of.refused or of.sometimes) and torch.are_deterministic_algorithms_enabled():
        deterministic(func, of, args, kwargs)
    out = drawn(func, here, args, kwargs) if of.random else computed(func, args, kwargs)
    if not here:
        return plain(out) if tensors else out
    if of.in_place:
        given = {id(t): t for t in tensors}  # the very tensor that it was given
        return tree_map_only(torch.Tensor, lambda t: given[id(t)] if id(t) in given else put(t), out)
    return named(out, new=not of.view)


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C._DisableTorchDispatch():
        return func(*args, **kwargs)


def flat(values: Any) -> list[torch.Tensor]:
    """The tensors among an operator's arguments, in order; they lie at most two lists deep."""
    out = []
    for value in values:
        if isinstance(value, torch.Tensor):
            out.append(value)
        elif isinstance(value, (list, tuple)):
            out += flat(value)
    return out


def named(out: Any, new: bool) -> Any:
    if isinstance(out, torch.Tensor):
        return put(out, new)
    return type(out)(named(o, new) for o in out) if isinstance(out, (list, tuple)) else out


def plain(out: Any) -> Any:
    """What an operator handed back in CPU memory, as a tensor of the CPU."""
    return tree_map_only(OnCard, lambda t: torch.Tensor._make_subclass(torch.Tensor, t), out)


def refuse_mixture(func: Any, of: Traits, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    free = {id(t) for t in flat(args[1:2]) if t.dtype in (torch.long, torch.int32, torch.bool)} if of.indexing else set()
    for number, tensor in enumerate(tensors):
        lone = tensor.dim() == 0 and of.lone_numbers and not (of.in_place and number == 0)
        if not (isinstance(tensor, OnCard) or lone or id(tensor) in free):
            places = ", ".join(f"{'cuda:0' if isinstance(t, OnCard) else t.device} {list(t.shape)}" for t in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func.name()} was given {places}")


def deterministic(func: Any, of: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """RuntimeError where CUDA has no deterministic algorithm, as torch.use_deterministic_algorithms documents."""
    refused = of.refused
    if of.name.startswith("cumsum"):
        refused = kwargs.get("dtype", args[0].dtype).is_floating_point
    elif of.name == "bincount":
        refused = len(args) > 1 and args[1] is not None
    elif of.name.startswith("scatter_reduce"):
        refused = args[4] == "prod"
    elif of.name in CUBLAS:
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            raise RuntimeError(f"{func.name()} is not deterministic because it uses cuBLAS: set CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8")
        return
    if refused:
        raise RuntimeError(f"{func.name()} does not have a deterministic implementation on CUDA")


def drawn(func: Any, here: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The card draws from its own default generator instead of the host's, and neither device from one of the other's."""
    given = kwargs.get("generator")
    if given is not None and (given._cdata in ON_CARD) != here:
        expected, actual = ("cuda", "cpu") if here else ("cpu", "cuda")
        raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{actual}' ({func.name()})")
    if not here:
        return computed(func, args, kwargs)
    host = torch.get_rng_state()
    torch.set_rng_state(card.generator.get_state())
    try:
        return computed(func, args, kwargs)
    finally:
        card.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(host)


# -- from one device to the other ------------------------------------------------------------------------------------------------


def put(tensor: torch.Tensor, new: bool = True) -> OnCard:
    """CPU memory in the card's name. OutOfMemoryError where the card has no room for it."""
    if isinstance(tensor, OnCard):
        return tensor
    if new and tensor.nbytes >= COUNTED:
        card.allocate(tensor)
    return torch.Tensor._make_subclass(OnCard, tensor, tensor.requires_grad)


def copied(tensor: torch.Tensor, to_card: bool) -> torch.Tensor:
    with torch.no_grad():
        return torch.ops.pretended.move(tensor.detach(), to_card)


def sent(tensor: torch.Tensor, to_card: bool) -> torch.Tensor:
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        copy = torch.Tensor.clone(tensor)
        copy = torch.Tensor._make_subclass(torch.Tensor, copy)
    return put(copy) if to_card else copy


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, to_card: bool) -> torch.Tensor:
        ctx.from_card = isinstance(tensor, OnCard)
        return copied(tensor, to_card)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return copied(grads[0], ctx.from_card), None


def moved(tensor: torch.Tensor, to_card: bool) -> torch.Tensor:
    if isinstance(tensor, OnCard) == to_card and not tensor.is_meta:
        return tensor
    if tensor.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    return Move.apply(tensor, to_card) if tensor.requires_grad and torch.is_grad_enabled() else copied(tensor, to_card)  # type: ignore[return-value]


def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.Tensor.to for tensors of both devices."""
    like = next((a for a in args if isinstance(a, torch.Tensor)), kwargs.pop("other", None))
    if like is not None:
        return to(tensor, like.device, like.dtype, **kwargs)
    at = next((i for i, a in enumerate(args) if isinstance(a, (str, int, torch.device)) and not isinstance(a, bool)), None)
    device = kwargs.pop("device", None) if at is None else args[at]
    rest = args if at is None else args[:at] + args[at + 1 :]
    if device is not None and not on_cuda(device) and torch.device(device).type != "cpu":  # meta
        return PLAIN_TO(tensor, device, *rest, **kwargs)
    out = PLAIN_TO(tensor, *rest, **kwargs) if any(a is not None and not isinstance(a, bool) for a in (*rest, *kwargs.values())) else tensor
    if out is tensor and (kwargs.get("copy") or (len(rest) == 3 and rest[2])):
        out = tensor.clone()
    return out if device is None else moved(out, on_cuda(device))


OnCard.to = to  # type: ignore[method-assign]
OnCard.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def from_data(make: Callable[..., Any]) -> Callable[..., Any]:
    """torch.tensor and its like, which reach no mode: made on the CPU, then sent."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        leaf = kwargs.pop("requires_grad", False)
        out = make(data, *args, **kwargs)
        out = out if device is None else out.to(device)
        return out.requires_grad_() if leaf else out

    return made


def on_host(make: Callable[..., Any]) -> Callable[..., Any]:
    """For what C++ puts together from parts that it makes where it sees the memory, on the CPU."""

    def made(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(make(moved(tensor, False), *args, **kwargs), isinstance(tensor, OnCard))

    return made


def on_cuda(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


# -- what torch.cuda answers -----------------------------------------------------------------------------------------------------


ON_CARD: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Generator(torch.Generator):
    """torch.Generator for either device; the card's is the CPU's under another label."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = super().__new__(cls, "cpu")
        self.on_card = on_cuda(device)
        if self.on_card:
            ON_CARD[self._cdata] = self  # an operator is handed another Python object of the same generator
        return self

    def __init__(self, device: Any = "cpu") -> None:
        pass

    device = property(lambda self: CUDA if self.on_card else CPU)  # type: ignore[assignment]


class Clockless:
    """A stream, an event or a graph: what is recorded runs at once, all of it takes a millisecond."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    wait_stream = record = synchronize = replay = __init__

    def elapsed_time(self, end: Any) -> float:
        return 1.0


UNTIMED: dict[str, Any] = {
    "Stream": Clockless, "Event": Clockless, "CUDAGraph": Clockless, "current_stream": Clockless,
    "stream": lambda *_: contextlib.nullcontext(), "graph": lambda *_, **__: contextlib.nullcontext(),
}  # fmt: skip


class Card:
    """Bytes of living tensors, by their storages, and what there is of them."""

    def __init__(self, total_memory: int = 80 << 30, capability: tuple[int, int] = (9, 0)) -> None:
        self.total_memory, self.capability = total_memory, capability
        self.generator = Generator("cuda")
        self._lock = threading.Lock()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = self.peak_bytes = 0

    def allocate(self, tensor: torch.Tensor) -> None:
        storage = torch.Tensor.untyped_storage(tensor)
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            self._at_most += size - self._storages.pop(key, (None, 0))[1]
            self._storages[key] = (StorageWeakRef(storage), size)
            if self._at_most > self.peak_bytes:
                self._forget_dead(self.peak_bytes)
                if self._at_most > self.total_memory:
                    self._at_most -= self._storages.pop(key)[1]
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                        f"{self.total_memory / 2**20:.2f} MiB of which {(self.total_memory - self._at_most) / 2**20:.2f} MiB is free."
                    )
                self.peak_bytes = max(self.peak_bytes, self._at_most)

    def _forget_dead(self, enough: int = -1) -> None:
        """Take what died out of the count, the newest first, until it is at most `enough`."""
        dead = []
        for key in reversed(self._storages):
            if self._storages[key][0].expired():
                dead.append(key)
                self._at_most -= self._storages[key][1]
                if self._at_most <= enough:
                    break
        for key in dead:
            del self._storages[key]

    @property
    def living_bytes(self) -> int:
        with self._lock:
            self._forget_dead()
            return self._at_most

    def forget_peak(self) -> None:
        self.peak_bytes = self.living_bytes

    def answers(self) -> dict[str, Callable[..., Any]]:
        """By name in torch.cuda."""
        major, minor = self.capability
        shape = SimpleNamespace(total_memory=self.total_memory, multi_processor_count=132, name="pretended", major=major, minor=minor)
        properties: dict[str, Any] = {
            "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "synchronize": None, "empty_cache": None,
            "get_device_name": "pretended", "get_device_capability": self.capability, "get_device_properties": shape, "_lazy_init": None,
            "is_current_stream_capturing": False, "ipc_collect": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
        }  # fmt: skip
        asked: dict[str, Callable[..., Any]] = {
            "memory_allocated": lambda: self.living_bytes, "memory_reserved": lambda: self.living_bytes,
            "max_memory_allocated": lambda: self.peak_bytes, "max_memory_reserved": lambda: self.peak_bytes,
            "reset_peak_memory_stats": self.forget_peak, "mem_get_info": lambda: (self.total_memory - self.living_bytes, self.total_memory),
            "get_rng_state": lambda: self.generator.get_state(), "get_rng_state_all": lambda: [self.generator.get_state()],
        }  # fmt: skip
        return {
            **{name: lambda *_, answer=answer, **__: answer for name, answer in properties.items()},
            **{name: lambda *_, ask=ask, **__: ask() for name, ask in asked.items()},
            **UNTIMED,
            "manual_seed": self.generator.manual_seed,
            "manual_seed_all": self.generator.manual_seed,
            "set_rng_state": lambda state, device=None: self.generator.set_state(state),
            "set_rng_state_all": lambda states: self.generator.set_state(states[0]),
            "is_bf16_supported": lambda including_emulation=True: including_emulation or self.capability >= (8, 0),
        }


card = Card()  # the one that is pretended now


@contextlib.contextmanager
def pretended_cuda(total_memory: int = 80 << 30, capability: tuple[int, int] = (9, 0)) -> Iterator[Card]:
    """torch with one pretended CUDA device."""
    global card
    with contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes")  # which later would find a card, and look for its driver
    _device_constructors()  # remembers what `with torch.device(...)` governs: torch's own functions, not those that take their place here
    before, card = card, Card(total_memory, capability)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in card.answers().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name, method in (("to", to), ("cuda", lambda self, *_, **__: moved(self, True)), ("pin_memory", lambda self, *_: self)):
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        for name in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(mock.patch.object(torch, name, from_data(getattr(torch, name))))
        for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"):
            stack.enter_context(mock.patch.object(torch, name, where_told(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.nn.functional, "one_hot", on_host(torch.nn.functional.one_hot)))
        stack.enter_context(mock.patch.object(threading.Thread, "run", entered(threading.Thread.run)))
        with contextlib.suppress(ImportError):
            timing = importlib.import_module("triton.testing")
            stack.enter_context(mock.patch.object(timing, "do_bench", lambda run, *_, **__: run() or 0.0))
        stack.enter_context(Below())
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to else swaps a parameter's data and keeps its type
        try:
            yield card
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            card = before


def entered(run: Callable[..., Any]) -> Callable[..., Any]:
    """Modes belong to a thread: a new one enters its own."""

    def inside(thread: threading.Thread) -> None:
        with Below():
            run(thread)

    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a module as a program on a pretended CUDA device.")
    parser.add_argument("--memory-gb", type=float, default=80.0)
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("module", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    major, _, minor = asked.capability.partition(".")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.argv = asked.module
    with pretended_cuda(int(asked.memory_gb * 1e9), (int(major), int(minor or 0))):
        runpy.run_module(asked.module[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
