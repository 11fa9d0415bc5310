"""`pipeline eval`: perplexity of a model, an artifact or a run with its protocol, or its scores on tasks. Knows no stage."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..devices.environment import compute_of
from ..evaluation.perplexity import bits_per_byte, evaluated_by, score
from ..evaluation.tasks import TaskScore, load_tasks, protocol_key, scores_of_tasks, task_record
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.hidden import Room
from ..models.loading import binder_of
from ..models.source import load_config, load_tokenizer, refuse_beyond, refuse_unknown_tokens
from ..recipes.recipe import resolve
from ..stages.inputs import Inputs
from ..store.artifact import Artifact, open_artifact
from ..store.files import scratch_directory
from ..store.rundir import run_of
from ..text import data
from .opening import opened


def evaluate_tasks(
    model: str, names: Sequence[str], *, limit: int | None = None, device: str = "auto", dtype: str | None = None
) -> dict[str, object]:
    """Scores on tasks, for `pipeline eval --tasks`: a row a metric. Of a stage of a run the change to the run's baseline as well, which is
    scored where the run has not done so."""
    tasks = load_tasks(names)
    run = run_of(Path(model))
    recipe = None if run is None else resolve(run.checked_recipe())
    compute = compute_of(run, device, dtype or (recipe.dtype if recipe is not None else "auto"))

    def scored(artifact: Artifact, kept: Path) -> dict[str, TaskScore]:
        return scores_of_tasks(artifact, kept, tasks, limit, compute.device, compute.dtype, binder_of(artifact, compute.device))

    with opened(model) as result, scratch_directory() as place:
        first: dict[str, TaskScore] = {}
        if run is not None and result.manifest["parent"] is not None:
            name = run.read()["stages"][0]["name"]
            measured = run.metrics(name) / f"tasks-{protocol_key(tasks, limit, compute.device, compute.dtype)}.json"
            first = scored(open_artifact(run.artifact(name)), measured.parent if measured.is_file() else place / "baseline")
        records = {name: task_record(score, first.get(name)) for name, score in scored(result, place).items()}
    rows = [{"task": name, **{key: value for key, value in asdict(made).items() if value is not None}} for name, made in records.items()]
    return {"model": model, "tasks": rows}


def evaluate(
    model: str,
    *,
    eval_source: str | None = None,
    seq_len: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a model or artifact with its protocol, for `pipeline eval`. Inside a run its own text, cut as the run cuts it, unless
    another text, length or number is given."""

    run = run_of(Path(model))
    recipe = None if run is None else resolve(run.checked_recipe())
    compute = compute_of(run, device, dtype or (recipe.dtype if recipe is not None else "auto"))
    with opened(model) as result, scratch_directory() as scratch:
        tokenizer, config = load_tokenizer(result.directory), load_config(result.directory)
        refuse_beyond(config, {"--seq-len": seq_len or (recipe.evaluation.seq_len if recipe is not None else 512)})
        if recipe is not None and eval_source in (None, recipe.data.evaluation):
            changes = {"seq_len": seq_len or recipe.evaluation.seq_len, "windows": windows or recipe.evaluation.windows}
            cut = Inputs(
                recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=changes)}), result.directory
            ).evaluation()
        else:
            documents = data.load_text(eval_source or "demo", "evaluation", tokenizer=tokenizer)
            cut = data.tokenize(documents, tokenizer, seq_len or 512, windows)
            refuse_unknown_tokens(config, cut.ids, eval_source or "demo")
        cut = evaluated_by(compute, cut)
        streamed = StreamedModel(result, compute.device, compute.dtype, binder_of(result, compute.device))
        with bar("perplexity, blocks", streamed.structure.blocks) as shown:
            room = Room.measured(compute.device, scratch)
            scores, _ = score(streamed, cut, None, lambda done, total: shown.advance(), room)
        return {
            "model": model,
            "perplexity": scores.perplexity,
            "bits_per_byte": bits_per_byte(scores, cut),
            "total_bytes": result.total_bytes(),
            "protocol": cut.protocol,
        }
