"""Opens what the user names (a run, a stage, a model) as an artifact, or loads it as a transformers model on the kernels of a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PretrainedConfig

from ...kernels.linear import resident_bytes
from ..devices.environment import compute_of
from ..errors import InputError
from ..models.binding import KernelBinder
from ..models.loading import whole_model
from ..models.source import refuse_revision, resolve_model
from ..stages.baseline import build_baseline, fingerprint
from ..store.artifact import Artifact, open_artifact
from ..store.files import scratch_directory
from ..store.manifest import MANIFEST
from ..store.rundir import RunDirectory, run_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_artifact(directory: Path, stage: str | None = None) -> Artifact:
    """The artifact of a stage (by address), or the last finished one."""
    place = RunDirectory(directory.resolve())
    rows = [row for row in place.read()["stages"] if place.artifact(row["name"]).is_dir()]
    if stage is not None:
        rows = [row for row in rows if row["address"] == stage]
    if not rows:
        what = f"stage {stage!r}" if stage else "finished stage"
        raise InputError(f"{directory}: has no {what}; `pipeline status {directory}` lists what there is")
    return open_artifact(place.artifact(rows[-1]["name"]))


@contextmanager
def opened(model: str, revision: str | None = None) -> Iterator[Artifact]:
    """The artifact behind a stage directory, a run directory (its last stage), or anything that names a model. InputError where its files
    are not those that were written."""
    refuse_revision(model, revision)
    path = Path(model).expanduser()
    if (path / MANIFEST).is_file() or (path / "run.json").is_file():
        artifact = open_artifact(path.resolve()) if (path / MANIFEST).is_file() else last_artifact(path)
        artifact.verify()
        yield artifact
    else:
        source = resolve_model(model, revision)
        if (source / MANIFEST).is_file():  # of the Hub
            artifact = open_artifact(source)
            artifact.verify()
            yield artifact
            return
        with scratch_directory() as place:
            key = fingerprint(source)
            manifest = {"key": key, "parent": None, "stage": {"name": "baseline", "method": None, "settings": {}}}
            yield build_baseline(source, place / "model.partial", place / "model", manifest)


def load(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """A run's or a stage's model as a plain `transformers` model on the kernels of this device: `generate`, `lm-eval --model hf`.
    Extra modules are part of it; virtual tokens take no place in its logits. dtype None is the one that the run was measured
    in on this kind of device, and what `auto` is elsewhere.

    Raises InputError for what is no artifact. The tokenizer lies in the artifact's directory (`AutoTokenizer.from_pretrained`).
    """
    with opened(str(directory)) as artifact:
        compute = compute_of(run_of(artifact.directory), device)
        model = bound_model(artifact, compute.device, dtype or compute.dtype)
        if (artifact.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(artifact.directory)
    return model


def bound_model(artifact: Artifact, device: torch.device, dtype: torch.dtype, config: PretrainedConfig | None = None) -> "PreTrainedModel":
    """An artifact's model on the kernels of a device. `config` stands for the artifact's own."""
    model = whole_model(artifact, device, dtype, KernelBinder("auto", device), config).model
    if artifact.linears:
        _stay(model, artifact.directory)
    model.config.use_cache = True
    return model


def _stay(model: "PreTrainedModel", directory: Path) -> None:
    """What transformers would do wrongly with weights that are no parameters: save them, and count them."""

    def refuse(*arguments: object, **settings: object) -> None:
        raise InputError(
            f"this model is bound to kernels and cannot be saved; its saved form is {directory}, and `pipeline export` writes others"
        )

    model.save_pretrained = refuse
    model.get_memory_footprint = lambda return_buffers=True: resident_bytes(model)
