"""A rank's part of stages, without the runner: every stage of each chain on the artifact before it. Run as code of `Processes.ranks`.

Arguments in BITMEND_RANKED (json): place, model, text, chains (name → stages of a recipe), sections,
rows (of a matrix that are swept at once), stops (name of a chain → at which of its queries whether to stop it stops).
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from bitmend.compress import feedback
from bitmend.pipelines import stages
from bitmend.pipelines.evaluation import perplexity
from bitmend.pipelines.models import state_checkpoints
from bitmend.pipelines.ranks import joining as world
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.recipes.stage_settings import StageSpec
from bitmend.pipelines.stages import inputs as texts
from bitmend.pipelines.stages.baseline import build_baseline
from bitmend.pipelines.store.artifact import Artifact, ArtifactWriter, open_artifact

asked = json.loads(os.environ["BITMEND_RANKED"])
perplexity.TOKENS_AT_ONCE, texts.HELD_OUT_TOKENS = asked["tokens_at_once"], asked["held_out_tokens"]
feedback._ROWS = asked["rows"]
state_checkpoints.SECONDS = 0.0  # so short a stage leaves no hidden states else
place, model = Path(asked["place"]), Path(asked["model"])
ranks = world.join()
if ranks.leads and not (place / "baseline").is_dir():
    place.mkdir(parents=True)
    build_baseline(model, place / "baseline.partial", place / "baseline", {"key": "baseline", "parent": None, "stage": {"name": "baseline"}})
ranks.barrier()
baseline = open_artifact(place / "baseline")


def asked_to_stop(after: int | None) -> Callable[[], bool]:
    """The same answer on all ranks: yes the `after`-th time."""
    times = 0

    def stop() -> bool:
        nonlocal times
        times += 1
        return ranks.agree(times == after)

    return stop


def finished(at: Path, parent: Artifact, spec: StageSpec, recipe: Recipe, stop: Callable[[], bool]) -> Artifact:
    if ranks.broadcast(at.is_dir()):
        return open_artifact(at)
    scratch = at.with_suffix(".partial")
    writer = ArtifactWriter(scratch, parent, ranks=ranks)
    context = stages.Context(
        baseline, baseline, place / "metrics", place / "teacher", scratch, torch.device("cpu"), torch.float32, recipe.seed,
        texts.Inputs(recipe, model), stop, ranks,
    )  # fmt: skip
    outcome = stages.perform(spec, parent, writer, context)
    ranks.barrier()
    if ranks.leads:
        documents = {n: (parent.directory / n).read_bytes() for n in parent.manifest["files"] if not n.endswith(".safetensors")}
        report = asdict(outcome) | {"documents": sorted(outcome.documents)}
        for timed in ("tokens_per_second", "memory"):
            report["metrics"].pop(timed, None)
        at.with_suffix(".json").write_text(json.dumps(report, sort_keys=True, default=str))
        writer.seal(at, {"key": at.name, "parent": parent.key, "stage": {"name": spec.address}}, {**documents, **outcome.documents})
    ranks.barrier()
    return open_artifact(at)


for name, chain in asked["chains"].items():
    recipe_file = place / f"{name}.json"
    if ranks.leads:
        recipe_file.write_text(json.dumps({"stages": chain, **asked["sections"]}))
    ranks.barrier()
    recipe = resolve(str(recipe_file), options={"model": str(model), "data": asked["text"]})
    parent, stop = baseline, asked_to_stop(asked["stops"].get(name))
    try:
        for number, spec in enumerate(recipe.stages):
            parent = finished(place / f"{name}-{number}", parent, spec, recipe, stop)
    except KeyboardInterrupt:
        print(f"stopped: {name}, stage {number}")
if ranks.size > 1:
    world.leave()
