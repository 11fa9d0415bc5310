"""Files of a checkpoint directory other than its weights: a config that old and new programs read, tokenizer files, a model card.

Knows no weights.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..store.files import read_json
from .checkpoint import Checkpoint
from .shards import copy_files, write_json

OF_QUANTIZATION: Mapping[str, tuple[type, ...]] = {
    "quant_method": (str,), "checkpoint_format": (str,), "format": (str,), "type": (str,), "bits": (int,), "num_bits": (int,), "group_size": (int,),
    "desc_act": (bool,), "sym": (bool,), "is_marlin_format": (bool,), "load_in_4bit": (bool,), "_load_in_4bit": (bool,), "dynamic": (dict, bool),
    "config_groups": (dict,), "types": (dict,), "weights": (dict,), "targets": (list,),
}  # fmt: skip
"""Types of what the readers here ask a quantization_config for; null stands for what is left out."""


def read_config(directory: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json without it, the quantization settings), which old GPTQ directories keep in quantize_config.json alone. InputError for
    a setting of another type than programs write."""
    config = read_json(directory / "config.json")
    file, quantization = directory / "config.json", config.pop("quantization_config", None)
    if quantization is None and (directory / "quantize_config.json").is_file():
        file = directory / "quantize_config.json"
        quantization = read_json(file)
    if not quantization:
        return config, None
    if not isinstance(quantization, dict):
        raise InputError(f"{file}: quantization_config is {quantization!r}, not a mapping of settings")
    groups = quantization.get("config_groups")
    for group in [quantization, *(groups.values() if isinstance(groups, dict) else ())]:
        for settings in (group, group.get("weights") or {}) if isinstance(group, dict) else (group,):
            check_types(f"{file}: quantization_config", settings, OF_QUANTIZATION)
    return config, quantization


def check_types(where: str, settings: object, kinds_of: Mapping[str, tuple[type, ...]]) -> None:
    """InputError, which begins with `where`, unless `settings` is a mapping whose values have one of these types each, or are null or left out."""
    if not isinstance(settings, dict):
        raise InputError(f"{where} holds {settings!r} where settings belong")
    for name, kinds in kinds_of.items():
        value = settings.get(name)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise InputError(f"{where} says {name} {value!r}; {' or '.join(kind.__name__ for kind in kinds)} was expected")


def write_folder(
    checkpoint: Checkpoint, directory: Path, quantization: Mapping[str, object] | None, notes: Sequence[str], how_to_load: str
) -> None:
    config = portable_config(checkpoint.config)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(directory / "config.json", config)
    copy_files(checkpoint.files, directory)
    (directory / "README.md").write_text(model_card(checkpoint.card, notes, how_to_load), encoding="utf-8")


def portable_config(config: Mapping[str, object]) -> dict[str, object]:
    """The config with the names of transformers 4 as well as those of 5: readers of GPTQ live on both sides of that change.

    transformers 4 looks for `torch_dtype`, `rope_theta` (GPT-NeoX: `rotary_emb_base`, `rotary_pct`) and `rope_scaling`, and falls back
    to its defaults in silence.
    """
    out = {name: value for name, value in config.items() if name != "quantization_config"}
    dtype = out.get("dtype", out.get("torch_dtype"))
    if dtype is not None:
        out["dtype"] = out["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = out.get("rope_parameters")
    if isinstance(rope, Mapping):
        for name, value in _old_rope(rope).items():
            out.setdefault(name, value)
    return out


def _old_rope(rope: Mapping[str, Any]) -> dict[str, object]:
    """`rope_parameters`, one set or one per kind of layer (Gemma 3), as the fields of transformers 4."""
    if isinstance(rope.get("full_attention"), Mapping):
        local = rope.get("sliding_attention") or {}
        out = _old_rope(rope["full_attention"])
        return {**out, "rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else out
    out: dict[str, object] = {}
    if "rope_theta" in rope:
        out["rope_theta"] = out["rotary_emb_base"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        out["partial_rotary_factor"] = out["rotary_pct"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return out


def model_card(card: Mapping[str, Any], notes: Sequence[str], how_to_load: str) -> str:
    """Markdown: what was done, what it cost in perplexity, under which protocol, how to load it."""
    lines = ["---", "library_name: transformers", "tags:", "- bitmend", "---", "", f"# {card.get('title', 'Compressed model')}", ""]
    lines += ["Compressed and recovered with bitmend.", ""]
    measured = [
        ("perplexity", "Perplexity"),
        ("baseline_perplexity", "Perplexity before compression"),
        ("bits_per_weight", "Bits per weight"),
        ("total_bytes", "Bytes"),
    ]
    rows = [f"| {label} | {_number(card[name])} |" for name, label in measured if card.get(name) is not None]
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    if card.get("protocol"):
        lines += ["## Protocol of the perplexity", "", *_listed(card["protocol"]), ""]
    if card.get("recipe"):
        recipe = card["recipe"]
        text = recipe if isinstance(recipe, str) else json.dumps(recipe, indent=2, ensure_ascii=False)
        lines += ["## Recipe", "", "```yaml" if isinstance(recipe, str) else "```json", text.rstrip(), "```", ""]
    lines += ["## Loading", "", "```python", how_to_load.rstrip(), "```", ""]
    if "read_by" in card:
        known = [f"- {program}" for program in card["read_by"]] or ["- no other program is known to; bitmend has read it back"]
        lines += ["## Read by", "", "Known to read exactly this file:", "", *known, ""]
    remarks = [*card.get("notes", ()), *notes]
    if remarks:
        lines += ["## Notes", "", *(f"- {note}" for note in remarks), ""]
    return "\n".join(lines)


def _listed(protocol: object) -> list[str]:
    """One line per entry; what is unknown is left out, and line breaks are shown as such."""
    if not isinstance(protocol, Mapping):
        return [str(protocol)]
    lines = []
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            lines += _listed(value)
        elif value is not None:
            shown = json.dumps(value, ensure_ascii=False) if isinstance(value, str) and not value.isprintable() else value
            lines.append(f"- {name.replace('_', ' ')}: {shown}")
    return lines


def _number(value: object) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
