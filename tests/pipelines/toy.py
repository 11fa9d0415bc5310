"""Text that a few training steps learn something from, and runs on it: what a recovery method does shows in seconds."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from bitmend.pipelines.evaluation.perplexity import last_hidden
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.store.artifact import Artifact, open_artifact
from bitmend.reports.record import RunRecord

from .runs import chosen, stage_directory

WORDS = ["river", "stone", "bridge", "winter", "garden", "letter", "engine", "music"]
RTN: dict[str, Any] = {"quantize": {"method": "rtn", "bits": 3, "group_size": 32}}
STEPS: dict[str, Any] = {"steps": 12, "batch_size": 4, "seq_len": 32, "eval_every": 3, "warmup": 2, "loss": "cross_entropy"}
SECTIONS: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 4}}
CPU = torch.device("cpu")


def toy_text(path: Path) -> Path:
    """60 documents that all say the same in other words."""
    draw = random.Random(0)
    lines = [" ".join(f"The {draw.choice(WORDS)} is near the {draw.choice(WORDS)}." for _ in range(12)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def run(place: Path, model: Path, text: Path, stages: list[dict[str, Any]], **sections: Any) -> RunRecord:
    """The stages' record; `place`/run is the run directory."""
    return runner.run(chosen(place, model, text, stages, **{**SECTIONS, **sections}), place / "run", device="cpu")


def opened(place: Path, address: str) -> Artifact:
    return open_artifact(stage_directory(place / "run", address))


def held_out_loss(place: Path, artifact: Artifact) -> float:
    """Mean negative log-likelihood of the artifact on disk on the run's held-out text, by the block-by-block pass that measures stages."""
    from bitmend.pipelines.recipes.recipe import resolve

    recipe = resolve(str(place / "run" / "recipe.resolved.yaml"))
    model, total, count = StreamedModel(artifact, CPU), 0.0, 0
    for batch in Inputs(recipe, artifact.directory).held_out(STEPS["seq_len"], STEPS["batch_size"]):
        ids, loss = batch.ids, batch.loss_mask
        with torch.no_grad():
            log_p = model.logits(last_hidden(model, ids)).log_softmax(-1)[:, :-1]
        nll = -log_p.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        mask = torch.ones_like(nll, dtype=torch.bool) if loss is None else loss[:, 1:]
        total, count = total + float(nll[mask].double().sum()), count + int(mask.sum())
    return total / count
