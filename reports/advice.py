"""What to try next, by rules over a run's numbers and settings.

Knows the names of stages, methods and settings as the command line has them. A rule fires only on what the record holds.
"""

import math
from collections.abc import Callable

from .findings import changes, worst_change, worst_role
from .json_values import is_finite
from .record import RunRecord, StageRecord
from .units import number, percent


def suggestions(record: RunRecord) -> list[str]:
    """What to try, from the stage that hurt most and from what is left of the gap."""
    result = changes(record.stages)
    worst = worst_change(result)
    present = {stage.stage.split(".")[0] for stage in record.stages}
    tips: list[str] = []
    if worst is not None:
        rules = RULES.get(worst.after.stage.split(".")[0])
        tips += rules(worst.after, present) if rules else []
    last, baseline = (record.stages[-1] if record.stages else None), record.baseline
    if last is not None and baseline is not None and last is not baseline and _left(last, baseline) > 0.02:
        tips += _more_recovery(record, present)
    for change in result:
        if change.after.stage.startswith("fuse") and abs(change.nats) > 1e-3 and not change.is_noise:
            apart = f"{change.after.stage} differs by {percent(abs(math.expm1(change.nats)))} from the stage before it"
            tips.append(f"{apart}: check the kernels with `pipeline doctor`.")
    return list(dict.fromkeys(tips))


def _left(last: StageRecord, baseline: StageRecord) -> float:
    if not last.perplexity or not baseline.perplexity or not is_finite(last.perplexity):
        return 0.0
    return math.log(last.perplexity / baseline.perplexity)


def _set(stage: StageRecord, key: str, value: object) -> str:
    return f"`--set {stage.stage}.{key}={value}`"


def _after_quantize(stage: StageRecord, present: set[str]) -> list[str]:
    bits, group = stage.settings.get("bits"), stage.settings.get("group_size")
    role = worst_role(stage.layers)
    tips = []
    if stage.method in ("rtn", "nf4"):
        tips.append(f"A method that looks at calibration text: {_set(stage, 'method', 'gptq')}.")
    if isinstance(group, int) and (group > 32 or group == -1):
        cost = 16 / 32 - (16 / group if group > 0 else 0)
        tips.append(f"Smaller groups: {_set(stage, 'group_size', 32)} ({number(cost, 2)} bits per weight more at 16-bit scales).")
    if isinstance(bits, int) and bits <= 3:
        where = f" for {role[0]} alone (an override), or everywhere" if role else ""
        wider = {"q2_k": ("grid", "q3_k"), "q3_k": ("grid", "q4_k")}.get(str(stage.settings.get("grid")), ("bits", bits + 1))
        tips.append(f"One more bit{where}: {_set(stage, *wider)}.")
    if "decompose" not in present:
        tips.append("A low-rank term that takes up what rounding lost: a `decompose` stage with `rank: 16`.")
    return tips


def _after_prune(stage: StageRecord, present: set[str]) -> list[str]:
    sparsity, pattern = stage.settings.get("sparsity"), str(stage.settings.get("pattern", ""))
    better = {"magnitude": "wanda", "wanda": "sparsegpt"}.get(stage.method or "")
    tips = [f"A criterion that knows more of the activations: {_set(stage, 'method', better)}."] if better else []
    if ":" in pattern:
        tips.append(f"A looser pattern: {_set(stage, 'pattern', '4:8')}, or `unstructured` where no hardware asks for {pattern}.")
    elif isinstance(sparsity, float) and sparsity > 0.1:
        tips.append(f"Less sparsity: {_set(stage, 'sparsity', round(sparsity - 0.1, 2))}.")
    if "quantize" in present:
        tips.append(
            f"No pruning at all ({_set(stage, 'method', 'none')}): codes and the mask, a bit per weight, are stored for removed weights too."
        )
    if "decompose" not in present:
        tips.append("A low-rank term that takes up what pruning removed: a `decompose` stage with `rank: 16`.")
    return tips


def _after_decompose(stage: StageRecord, present: set[str]) -> list[str]:
    tips = [] if stage.method == "qera_exact" else [f"The closed form under the full second moment: {_set(stage, 'method', 'qera_exact')}."]
    return [*tips, "More calibration text (`--set calibration.samples=…`): from few tokens the second moment is noisy."]


def _after_recover(stage: StageRecord, present: set[str]) -> list[str]:
    return [
        *_search(stage),
        f"The baseline as teacher: {_set(stage, 'loss', 'distill')}.",
        "Training text nearer to the evaluation text (`--train`).",
    ]


def _search(stage: StageRecord) -> list[str]:
    searched = stage.settings.get("learning_rate") == "search"
    return [] if searched else [f"A learning rate found on held-out text: {_set(stage, 'learning_rate', 'search')}."]


def _after_fuse(stage: StageRecord, present: set[str]) -> list[str]:
    return [f"The plain kernel, to see whether the fused one is at fault: {_set(stage, 'backend', 'reference')}."]


RULES: dict[str, Callable[[StageRecord, set[str]], list[str]]] = {
    "quantize": _after_quantize,
    "prune": _after_prune,
    "decompose": _after_decompose,
    "recover": _after_recover,
    "fuse": _after_fuse,
}


def _more_recovery(record: RunRecord, present: set[str]) -> list[str]:
    """What recovery could still do where more than 2 % of perplexity is left to win."""
    if "recover" not in present:
        return ["A `recover` stage: short training of few parameters against the baseline."]
    stage = [stage for stage in record.stages if stage.stage.split(".")[0] == "recover"][-1]
    steps = stage.settings.get("steps")
    tips = _search(stage) if stage.metrics.get("times_restored") else []
    tips += [f"Longer recovery: {_set(stage, 'steps', 2 * steps)}."] if isinstance(steps, int) and steps > 0 else []
    if stage.settings.get("loss") == "distill":
        tips.append(f"Cross-entropy on the text in addition to the teacher's logits: {_set(stage, 'loss', 'both')}.")
    if stage.method in ("lora", "perp") and not stage.settings.get("scales") and "quantize" in present:
        tips.append(f"Recovery that costs no byte, training the grid's own scales: {_set(stage, 'method', 'scales')}.")
    return tips
