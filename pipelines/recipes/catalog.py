"""The catalog of methods that `pipeline list` and `pipeline show` print, a file written from the registries, so that they need not import torch.

`python -m bitmend.pipelines.recipes.catalog` writes catalog.json anew; a test compares it with the registries.
"""

import inspect
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .settings import absolute, read_mapping, unknown
from .stage_settings import SHARED, STAGES, config_keys, fields_of, methods

FILE = Path(__file__).with_name("catalog.json")
LINE = 140


@cache
def catalog() -> dict[str, Any]:
    """As `described` makes it."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def named(method: str) -> list[dict[str, Any]]:
    """The methods of that name, each with its stage: `loftq` decomposes, and recovers. UsageError with the nearest known one."""
    stages = catalog()["methods"]
    result = [{"stage": stage, "method": method, **rows[method]} for stage, rows in stages.items() if method in rows]
    if not result:
        raise UsageError(unknown("method", method, {name for rows in stages.values() for name in rows}))
    return result


def packaged(recipe: str, model: str | None, profile: str | None) -> dict[str, object] | None:
    """The settings of a packaged recipe of which a model and a profile alone are chosen, as `resolve` gives them; None for any other."""
    known = catalog()["recipes"].get(recipe)
    if known is None or model == "":
        return None
    chosen = known["demo"]["model"] if model is None else model
    return known[profile or ("demo" if chosen == "demo" else "standard")] | {"model": absolute(chosen)}


def described() -> dict[str, Any]:
    """{"recipes": name → {"about", and its settings under each profile}, "methods": stage → name → what a reader wants to know}."""
    from .layers import PROFILES
    from .recipe import RECIPES, known_recipes, resolve

    recipes = {
        name: {"about": read_mapping(RECIPES / f"{name}.yaml")["about"]}
        | {profile: resolve(name, options={"profile": profile}).settings() for profile in PROFILES}
        for name in known_recipes()
    }
    return {"recipes": recipes, "methods": {stage: {name: _method(stage, name) for name in methods(stage)} for stage in STAGES}}


def _method(stage: str, name: str) -> dict[str, Any]:
    row = methods(stage)[name]
    return {
        "does": f"trains {row.trains}" if stage == "recover" else row.does,
        "paper": row.paper,
        "departs": getattr(row, "departs", ""),
        "ways": asdict(row.ways) if stage == "recover" else {},
        "settings": [asdict(field) for field in fields_of(stage, name)],
        "advice": _advice(stage, row),
    }


def _advice(stage: str, row: Any) -> list[str]:
    """What the method's config says of its settings, then the docs of those that the whole stage shares."""
    from ...recover.trainable import RATES
    from ...recover.training_run import TrainConfig

    texts = [] if (row.config.__doc__ or "").startswith(f"{row.config.__name__}(") else [row.config.__doc__]
    if stage == "recover" and not row.by_block:
        texts += [TrainConfig.__doc__, f"learning_rate: null is {RATES[row.main]:g}."]
    texts += [f"{key}: {SHARED[key]}" for key in STAGES[stage][3] if key not in config_keys(row)]
    return [" ".join(part.split()) for text in texts for part in inspect.cleandoc(text).split("\n\n")]


def text(value: object, indent: int = 0) -> str:
    """JSON with as much on a line as fits."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= LINE or not isinstance(value, dict | list):
        return line
    inner = indent + 1
    items = (
        [f"{json.dumps(key)}: {text(item, inner)}" for key, item in value.items()]
        if isinstance(value, dict)
        else [text(item, inner) for item in value]
    )
    left, right = "{}" if isinstance(value, dict) else "[]"
    space = " " * inner
    return f"{left}\n{space}" + f",\n{space}".join(items) + f"\n{' ' * indent}{right}"


if __name__ == "__main__":
    FILE.write_text(text(described()) + "\n", encoding="utf-8")
