"""Seconds of one training step, for `pipeline bench recover`: every method in turn, so that what else the machine does slows all alike.

What a step costs does not depend on the text or on what the teacher says: random tokens, and a teacher whose last states are random.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from ...recover.compressed_model import cache_dense, compressed_linears
from ...recover.losses import Objective
from ...recover.recovery_methods import RECOVER, attach
from ...recover.selection import decoder_blocks
from ...recover.site import Gradients
from ...recover.student import Batch, Teacher, student_of
from ...recover.train import Hooks, TrainingText, batch_loss, train
from ..models.loading import whole_model
from ..models.source import load_config
from ..models.structure import inspect, skeleton
from ..recipes.stage_settings import StageSpec
from ..stages.writing import InPlace
from ..store.artifact import Artifact


def step_seconds(
    parent: Artifact, specs: Sequence[StageSpec], device: torch.device, repeats: int, dtype: torch.dtype = torch.float32, blocks: int | None = None
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Method → median seconds of an optimizer step from `parent`, or from its first so many `blocks`, and how far apart the repeats lie. A
    method that solves block by block has no step of the whole model and is left out."""
    samples: dict[str, list[float]] = {spec.method: [] for spec in specs if not RECOVER[spec.method].by_block}
    for _ in range(repeats):
        for spec in specs:
            if spec.method in samples:
                samples[spec.method].append(_second_step(parent, spec, device, dtype, blocks))
    return {
        name: {"seconds_per_step": statistics.median(seconds), "step_spread": max(seconds) - min(seconds)}
        for name, seconds in samples.items()
    }


def _second_step(parent: Artifact, spec: StageSpec, device: torch.device, dtype: torch.dtype, blocks: int | None) -> float:
    """The first one builds what later ones find; one model is in memory at a time."""
    structure = inspect(skeleton(load_config(parent.directory)))
    model = whole_model(parent, device, dtype, InPlace(parent, structure, device, dtype)).model.requires_grad_(False)
    if blocks is not None:
        del decoder_blocks(model)[1][blocks:]
    student, config = student_of(model), spec.config
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (config.batch_size, config.seq_len), generator=draw).to(device)
    head = model.get_output_embeddings()
    assert head is not None
    states = torch.randn(*ids.shape, head.weight.shape[1], generator=draw).to(device, dtype)

    def batches(_: int) -> Batch:
        return Batch(ids)

    gradients = Gradients(batches, lambda batch: batch_loss(student, batch, None, Objective("cross_entropy", 1.0)))
    attached = attach(spec.method, model, spec.config, gradients=gradients)
    cache_dense(compressed_linears(model), float("inf"))
    ends: list[float] = []

    def note() -> bool:
        """Asked before every step, and behind the last one of a run of two."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        return len(ends) == 3

    train(
        model, attached, TrainingText(batches, [], Teacher(lambda batch: states, student.logits)), config,
        student=attached.run or student, main=RECOVER[spec.method].main, hooks=Hooks(stop=note),
    )  # fmt: skip
    if len(ends) == 2:
        note()
    return ends[2] - ends[1]
