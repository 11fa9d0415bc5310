"""Pipelines: from a model's name to a compressed, recovered, measured one. `load` gives a run's model as a transformers model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run.opening import load as load


def __getattr__(name: str) -> object:
    """`load` is imported on first access: the command line must not wait for torch."""
    if name == "load":
        from .run.opening import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
