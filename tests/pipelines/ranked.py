"""A rank's part of stages, without the runner: every stage of each chain on the artifact before it. Run as code of `Processes.ranks`.

Arguments in BITMEND_RANKED (json): place, model, text, chains (name → stages of a recipe), sections.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from bitmend.pipelines import ranks as world
from bitmend.pipelines import stages
from bitmend.pipelines.evaluation import perplexity
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.stages import inputs as texts
from bitmend.pipelines.stages.baseline import build_baseline
from bitmend.pipelines.store.artifact import ArtifactWriter, open_artifact

asked = json.loads(os.environ["BITMEND_RANKED"])
perplexity.TOKENS_AT_ONCE, texts.HELD_OUT_TOKENS = asked["tokens_at_once"], asked["held_out_tokens"]
place, model = Path(asked["place"]), Path(asked["model"])
ranks = world.join()
if ranks.leads:
    place.mkdir(parents=True)
    build_baseline(model, place / "baseline.partial", place / "baseline", {"key": "baseline", "parent": None, "stage": {"name": "baseline"}})
ranks.barrier()
baseline = open_artifact(place / "baseline")
for name, chain in asked["chains"].items():
    recipe_file = place / f"{name}.json"
    if ranks.leads:
        recipe_file.write_text(json.dumps({"stages": chain, **asked["sections"]}))
    ranks.barrier()
    recipe = resolve(str(recipe_file), options={"model": str(model), "data": asked["text"]})
    parent, inputs = baseline, texts.Inputs(recipe, model)
    for number, spec in enumerate(recipe.stages):
        at = place / f"{name}-{number}"
        scratch = at.with_suffix(".partial")
        writer = ArtifactWriter(scratch, parent, ranks=ranks)
        context = stages.Context(
            baseline, baseline, place / "metrics", place / "teacher", scratch, torch.device("cpu"), torch.float32, recipe.seed, inputs,
            lambda: ranks.agree(False), ranks,
        )  # fmt: skip
        outcome = stages.perform(spec, parent, writer, context)
        ranks.barrier()
        if ranks.leads:
            documents = {n: (parent.directory / n).read_bytes() for n in parent.manifest["files"] if not n.endswith(".safetensors")}
            writer.seal(at, {"key": at.name, "parent": parent.key, "stage": {"name": spec.address}}, {**documents, **outcome.documents})
            said = asdict(outcome) | {"documents": sorted(outcome.documents)}
            for timed in ("tokens_per_second", "memory"):
                said["metrics"].pop(timed, None)
            (place / f"{name}-{number}.json").write_text(json.dumps(said, sort_keys=True, default=str))
        ranks.barrier()
        parent = open_artifact(at)
if ranks.size > 1:
    world.leave()
