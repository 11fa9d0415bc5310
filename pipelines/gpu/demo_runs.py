"""demo: the demo recipe on the card in float32 and in bfloat16, compared with the README's numbers from a CPU; train: a longer training on it.

Both are runs of the command line, which go on where they were stopped. Knows runs by their record; not what a stage does.
"""

import json
from pathlib import Path
from typing import Any

from .card_results import CardPart
from .child import ROOT, Call

DEMO_COLUMNS = (
    ("dtype", "dtype"), ("stage", "stage"), ("method", "method"), ("perplexity", "perplexity"), ("cpu_perplexity", "README, CPU"),
    ("kl_to_baseline", "KL to baseline"), ("seconds", "seconds"), ("cpu_seconds", "README, CPU"), ("peak_bytes", "memory of the card"),
)  # fmt: skip
TRAIN_COLUMNS = (
    ("stage", "stage"), ("method", "method"), ("perplexity", "perplexity"), ("gap_closed", "gap closed"), ("steps", "steps"), ("tokens", "tokens"),
    ("tokens_per_second", "tokens/s"), ("seconds", "seconds"), ("peak_bytes", "memory of the card"),
)  # fmt: skip
TRAINED: list[dict[str, Any]] = [
    {"quantize": {"method": "gptq", "bits": 3, "group_size": 64}},
    {"recover": {"method": "scales", "norms": True, "loss": "both"}},
]


def demo(part: CardPart, call: Call) -> None:
    """A run for each dtype; a stage is a row as soon as it is measured."""
    known = readme_table()
    part.remain([f"demo-{dtype}" for dtype in call.plan.dtypes] if part.left is None else part.left)
    for dtype in call.plan.dtypes:

        def keep(stage: dict[str, Any], dtype: str = dtype) -> None:
            cpu = known.get(stage["stage"], {}) if call.plan.model == "demo" else {}
            row = {key: stage.get(key) for key in ("stage", "method", "perplexity", "kl_to_baseline", "seconds", "peak_bytes")}
            part.add(f"{dtype} {stage['stage']}", {"dtype": dtype} | row | cpu)

        _run(part, call, f"demo-{dtype}", "compress_and_recover", ("--dtype", dtype, *_sets(call.plan.sets)), keep)


def train(part: CardPart, call: Call) -> None:
    """One run: GPTQ at 3 bits, then its scales and the norms for a fixed number of steps."""
    part.remain(["train"])
    call.place.mkdir(parents=True, exist_ok=True)
    recipe = call.place / "train.json"
    sections = {"calibration": {"samples": 16, "seq_len": 512}, "evaluation": {"seq_len": 512, "windows": 16}}
    recipe.write_text(json.dumps({"name": "train", "stages": TRAINED, **sections}), encoding="utf-8")

    def keep(stage: dict[str, Any]) -> None:
        row = {key: stage.get(key) for key in ("stage", "method", "perplexity", "gap_closed", "seconds", "peak_bytes")}
        part.add(stage["stage"], row | {key: stage.get("metrics", {}).get(key) for key in ("steps", "tokens", "tokens_per_second")})

    _run(part, call, "train", str(recipe), _sets(call.plan.training), keep)


def _run(part: CardPart, call: Call, name: str, recipe: str, options: tuple[str, ...], keep: Any) -> None:
    """The run, or its next two minutes."""
    left = part.left or []
    if call.over() or name not in left:
        return
    place, seen = call.place / name, 0

    def watch() -> None:
        nonlocal seen
        record = place / "record.json"
        stages = json.loads(record.read_text(encoding="utf-8"))["stages"] if record.is_file() else []
        for stage in stages[seen:]:
            keep(stage)
            part.say(f"{name}, {stage['stage']}: perplexity {stage['perplexity']:.3f}, {stage['seconds'] or 0:.1f} s")
        seen = len(stages)

    source = ("-m", call.plan.model, "--data", call.plan.data)
    code = call.run("bitmend.pipelines.cli", ["run", recipe, *source, "-o", str(place), "--device", "cuda", *options], name, watch)
    if code == 0:
        part.note(name, None)
        part.remain([other for other in left if other != name])
    elif code is not None:
        part.note(name, f"{name}: exit code {code}: {call.last_line(name)}")
    else:
        part.say(f"{name} was stopped in time: {call.last_line(name)}")


def _sets(sets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for setting in sets for word in ("--set", setting))


def readme_table(path: Path = ROOT / "README.md") -> dict[str, dict[str, Any]]:
    """Stage → what the README's demo table says of it, measured on a CPU."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| stage | method | perplexity"))
    titles = [cell.strip() for cell in lines[first].strip("|").split("|")]
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(titles, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        number, unit = row["time"].split()
        rows[row["stage"]] = {"cpu_perplexity": float(row["perplexity"]), "cpu_seconds": float(number) * (60 if unit == "min" else 1)}
    return rows
