"""A whole artifact in memory as an ordinary transformers model, for training and for generation. Knows no recipe."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..kernels.linear import resident_bytes
from .artifact import MANIFEST, Artifact, open_artifact
from .binding import KernelBinder
from .blocks import Binder, StreamedModel
from .errors import InputError
from .models import resolve_model
from .perplexity import run_of
from .surroundings import compute_of


def whole_model(artifact: Artifact, device: torch.device, dtype: torch.dtype, bind: Binder | None = None) -> StreamedModel:
    """Every block loaded; `.model` is the transformers model, in eval mode, without gradients, virtual tokens in front."""
    streamed = StreamedModel(artifact, device, dtype, bind)
    for index in range(streamed.structure.blocks):
        streamed.load_block(index)
        streamed.expect(index + 1)
    if streamed.tokens is not None:
        streamed.tokens.stand_before(streamed.model)
    return streamed


@contextmanager
def opened(model: str, revision: str | None = None) -> Iterator[Artifact]:
    """The artifact behind a stage directory, a run directory (its last stage), or anything that names a model."""
    path = Path(model).expanduser()
    if (path / MANIFEST).is_file():
        yield open_artifact(path.resolve())
    elif (path / "run.json").is_file():
        from .ledger import last_artifact

        yield last_artifact(path)
    else:
        from .stages.baseline import build_baseline, fingerprint

        source = resolve_model(model, revision)
        with tempfile.TemporaryDirectory(prefix="bitmend-") as place:
            key = fingerprint(source)
            manifest = {"key": key, "parent": None, "stage": {"name": "baseline", "method": None, "settings": {}}}
            yield build_baseline(source, Path(place) / "model.partial", Path(place) / "model", manifest)


def is_fused(artifact: Artifact) -> bool:
    return artifact.manifest["stage"]["name"].startswith("fuse")


def binder_of(artifact: Artifact, device: torch.device) -> Binder | None:
    """The kernels for a fused artifact, dense weights for any other."""
    if not is_fused(artifact):
        return None
    return KernelBinder(artifact.manifest["stage"]["settings"].get("backend", "auto"), device)


def load(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A run's or a stage's model as a plain `transformers` model on the kernels of this device: `generate`, `lm-eval --model hf`.
    What stands beside the model is part of it; virtual tokens take no place in its logits. dtype None is the one that the run was measured
    in on this kind of device, and what `auto` is elsewhere.

    Raises InputError for what is no artifact. The tokenizer lies in the artifact's directory (`AutoTokenizer.from_pretrained`).
    """
    with opened(str(directory)) as artifact:
        compute = compute_of(run_of(artifact.directory), device)
        place, chosen = compute.device, dtype or compute.dtype
        streamed = whole_model(artifact, place, chosen, KernelBinder("auto", place))
        if (artifact.directory / "generation_config.json").is_file():
            streamed.model.generation_config = GenerationConfig.from_pretrained(artifact.directory)
        if artifact.linears:
            _stay(streamed.model, artifact.directory)
    streamed.model.config.use_cache = True
    return streamed.model


def _stay(model: Any, directory: Path) -> None:
    """What transformers would do wrongly with weights that are no parameters: save them, and count them."""

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise InputError(
            f"this model is bound to kernels and cannot be saved; its saved form is {directory}, and `pipeline export` writes others"
        )

    model.save_pretrained = refuse
    model.get_memory_footprint = lambda return_buffers=True: resident_bytes(model)
