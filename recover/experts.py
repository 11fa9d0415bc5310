"""The fused experts of a mixture as linears that can train, each under its own name.

transformers keeps one matrix of all experts in one parameter [E, O, I] (or [E, I, O]) and, in its eager implementation, multiplies the
tokens that reach an expert by that expert's slice. `ExpertMatrices` takes the parameter's place; the experts' own code stays as it is.
Knows modules; not records, nor what trains. Legend: E experts, T tokens, O out, I in.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertMatrices(nn.Module):
    """Child "e" is the linear of expert e: [T, I] → [T, O]; `self[e]` stands for its matrix in a product."""

    def __init__(self, linears: Iterable[nn.Module]) -> None:
        super().__init__()
        for number, linear in enumerate(linears):
            self.add_module(str(number), linear)

    def __getitem__(self, expert: int | Tensor) -> "_Matrix":
        return _Matrix(self.get_submodule(str(int(expert))))


class _Matrix:
    """Multiplied by, it runs the linear; nothing else can be done with it."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> Tensor:
        if func not in PRODUCTS or len(args) != 2 or kwargs or not isinstance(args[1], cls):
            name = getattr(func, "__name__", func)
            raise NotImplementedError(f"experts whose code does more with a matrix than multiply tokens by it ({name}) cannot train")
        return args[1].linear(args[0])


def is_expert(model: nn.Module, name: str) -> bool:
    """Whether `name` is `<module>.<parameter>.<number>`: one matrix of a fused parameter, installed as a linear or not."""
    owner, _, number = name.rpartition(".")
    module, _, parameter = owner.rpartition(".")
    if not number.isdigit() or not parameter:
        return False
    try:
        held = getattr(model.get_submodule(module), parameter, None)
    except AttributeError:
        return False
    return isinstance(held, ExpertMatrices) or (isinstance(held, nn.Parameter) and held.ndim == 3)


def install_experts(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Put linears in the place of whole fused parameters. ValueError where some experts of one are missing."""
    fused: dict[str, dict[int, nn.Module]] = {}
    for name, linear in linears.items():
        owner, _, number = name.rpartition(".")
        fused.setdefault(owner, {})[int(number)] = linear
    for name, experts in fused.items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        count = len(getattr(module, parameter))
        if sorted(experts) != list(range(count)):
            raise ValueError(f"{name}: {len(experts)} of its {count} experts have a record; all of them share one parameter")
        delattr(module, parameter)
        module.add_module(parameter, ExpertMatrices(experts[number] for number in range(count)))


def put_back(module: nn.Module, parameter: str, value: nn.Parameter) -> None:
    """Undo `install_experts` for one parameter: `value` is what the module holds from now on."""
    if isinstance(getattr(module, parameter), ExpertMatrices):
        delattr(module, parameter)
        module.register_parameter(parameter, value)
