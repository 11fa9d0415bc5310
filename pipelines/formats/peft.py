"""PEFT directories: a low-rank term or virtual tokens in DIR/adapter, the base model in any format in DIR/base.

Each module's scaling is 1: lora_alpha equals r, per module where ranks differ. Knows adapters; the base is another format's business.
Legend: O out, I in, R rank, P virtual tokens, L layers, K key-value heads, W head width, D model width.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...compress.weights import DenseWeight, LowRank, StoredWeight, UniformWeight
from ...recover.extra_modules import TOKENS, ExtraModules, Tokens
from ...recover.prompts import peft_settings
from ..errors import InputError, UsageError
from ..store.files import read_json
from .checkpoint import Checkpoint, Lazy
from .folder import check_types
from .naming import expert_parameter
from .shards import FLOATING, Stored, fresh_directory, open_directory, save, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
VIRTUAL = {"PREFIX_TUNING": "prefix_tuning", "PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning"}
BASE, ADAPTER = "base", "adapter"
SETTINGS = "adapter_config.json"
OF_ADAPTER: Mapping[str, tuple[type, ...]] = {
    "peft_type": (str,), "lora_alpha": (int, float), "alpha_pattern": (dict,), "bias": (str,), "use_rslora": (bool,), "use_dora": (bool,),
    "modules_to_save": (list,), "num_layers": (int,), "num_attention_heads": (int,),
}  # fmt: skip
"""Types of what is read of an adapter's settings."""
LARGEST_ALPHA = 1e6
WriteBase = Callable[..., list[str]]

CARD = """---
library_name: peft
---

# {title}

{about}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("../{base}"), ".")
```
"""


def with_low_rank(checkpoint: Checkpoint) -> int:
    """How many linears have a low-rank term."""
    return sum(record.low_rank is not None for record in checkpoint.linears.values())


ABOUT = {
    "Low-rank term": "The term that bitmend fitted on top of the compressed model in `../{base}`; its scaling is 1 everywhere.",
    "Virtual tokens": "What bitmend trained in front of the text for the compressed model in `../{base}`.",
}


def write(checkpoint: Checkpoint, directory: Path, write_base: WriteBase, **options: object) -> list[str]:
    """DIR/base by `write_base` (a format's `write`, with its options) and DIR/adapter. UsageError without a low-rank term or virtual
    tokens, and for what PEFT does not know."""
    tokens = virtual_tokens(checkpoint)
    if tokens is not None:
        with fresh_directory(directory) as scratch:
            notes = write_base(replace(checkpoint, extra_modules=()), scratch / BASE, **options)
            config = {**peft_settings(tokens).to_dict(), "base_model_name_or_path": f"../{BASE}"}
            values = {"prompt_embeddings": tokens.values.reshape(tokens.count, -1).contiguous()}
            _write_adapter(scratch / ADAPTER, config, values, "Virtual tokens")
        return [*notes, f"{tokens.count} virtual tokens are in {ADAPTER}/, to be loaded by PEFT on top of {BASE}/"]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, record in checkpoint.linears.items():
        if record.low_rank is not None and record.low_rank.rank > 0:
            factors[name] = _factors(name, record.low_rank)
    if not factors:
        raise UsageError("no linear of this model has a low-rank term, so there is no adapter to write; leave --adapter out")
    quantized = sum(_is_quantized(record.low_rank) for record in checkpoint.linears.values())
    again = [n for n in factors if (term := checkpoint.linears[n].low_rank) is not None and term.shared is not None]
    with fresh_directory(directory) as scratch:
        base = checkpoint.with_linears(Lazy({name: partial(_without, checkpoint.linears, name) for name in checkpoint.linears}))
        notes = write_base(base, scratch / BASE, **options)
        config = adapter_config({name: down.shape[0] for name, (_, down) in factors.items()})
        _write_adapter(scratch / ADAPTER, config, _named(factors), "Low-rank term")
    if quantized:
        notes.append(
            f"{quantized} low-rank terms had quantized factors; a PEFT adapter stores them as floating point, the values are the same"
        )
    if again:
        more = sum(factors[n][1].numel() * factors[n][1].element_size() for n in again)
        notes.append(f"{len(again)} linears share another's right factor here; a PEFT adapter stores one for each, {more} bytes more")
    return [*notes, f"the low-rank term of {len(factors)} linears is in {ADAPTER}/, to be loaded by PEFT on top of {BASE}/"]


def _write_adapter(directory: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], title: str) -> None:
    directory.mkdir()
    write_json(directory / SETTINGS, config)
    save(directory / "adapter_model.safetensors", dict(tensors))
    (directory / "README.md").write_text(CARD.format(title=title, about=ABOUT[title].format(base=BASE), base=BASE), encoding="utf-8")


def virtual_tokens(checkpoint: Checkpoint) -> Tokens | None:
    """The model's virtual tokens. UsageError for bottlenecks, and for tokens combined with a low-rank term."""
    for extra in checkpoint.extra_modules:
        if extra.bottlenecks:
            raise UsageError(
                f"{extra.method} adds bottleneck modules, which cannot be merged and which no format here has a place for: "
                "run them with bitmend.pipelines.load(RUN_DIR) or `pipeline generate`, or export an earlier --stage"
            )
    result = [tokens for extra in checkpoint.extra_modules if (tokens := extra.virtual()) is not None]
    if result and with_low_rank(checkpoint):
        raise UsageError("PEFT runs a low-rank term or virtual tokens, not both; export a --stage that has one of them")
    return result[-1] if result else None


def adapter_config(ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT's LoRA settings for module → rank."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"../{BASE}", "inference_mode": True,
        "r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted(ranks),
    }  # fmt: skip


def read(directory: Path, read_base: Callable[[Path], Checkpoint]) -> Checkpoint:
    """DIR/base by `read_base` with the factors of DIR/adapter in its records, or its virtual tokens as extra modules. InputError for adapters
    of another kind, and for settings and factors that no program writes."""
    base, adapter = read_base(directory / BASE), directory / ADAPTER
    config = read_json(adapter_settings(directory))
    check_types(str(adapter_settings(directory)), config, OF_ADAPTER)
    file = adapter / "adapter_model.safetensors"
    if not file.is_file() and (adapter / "adapter_model.bin").is_file():
        raise InputError(f"{adapter / 'adapter_model.bin'} is a pickle file, which can run code when opened; only safetensors are read")
    stored = open_directory(adapter)
    if config.get("peft_type") in VIRTUAL:
        return replace(base, extra_modules=(_read_tokens(config, _entry(stored, "prompt_embeddings", file)),))
    _check_config(adapter, config)
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in stored})
    linears: dict[str, Callable[[], StoredWeight]] = {name: partial(base.linears.__getitem__, name) for name in base.linears}
    tensors: dict[str, Callable[[], Tensor]] = {name: partial(base.tensors.__getitem__, name) for name in base.tensors}
    for module in modules:
        up, down = (_entry(stored, f"{PREFIX}{module}.lora_{letter}.weight", file) for letter in "BA")
        if len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise InputError(
                f"{file}: {module} has lora_B {list(up.shape)} and lora_A {list(down.shape)}, which are no factors of a matrix"
            )
        scaling = _scaling(adapter, config, module, down.shape[0])
        if module not in linears and f"{module}.weight" not in tensors:
            raise InputError(f"{file}: the adapter reaches {module}, which {directory / BASE} does not have")
        linears[module] = partial(_joined, base, module, up, down, scaling)
        tensors.pop(f"{module}.weight", None)
    return replace(base, linears=Lazy(linears), tensors=Lazy(tensors))


def adapter_settings(directory: Path) -> Path:
    return directory / ADAPTER / SETTINGS


def _read_tokens(config: Mapping[str, Any], entry: Stored) -> ExtraModules:
    """A prompt [P, D] or a prefix [P, L·2·K·W] as PEFT saves what it trained, p-tuning's network already run."""
    if len(entry.shape) != 2 or not all(entry.shape):
        raise InputError(f"{entry.file}: {entry.name} is {list(entry.shape)}; a row of numbers for each virtual token was expected")
    method, values = VIRTUAL[config["peft_type"]], entry.load()
    if method != "prefix_tuning":
        return ExtraModules(method, tokens="prompt", tensors={TOKENS: values})
    layers, heads = config.get("num_layers") or 0, config.get("num_attention_heads") or 0
    if layers < 1 or heads < 1 or values.shape[1] % (2 * layers * heads):
        raise InputError(f"{entry.file}: {list(values.shape)} values are no keys and values of {layers} layers of {heads} heads")
    return ExtraModules(method, tokens="prefix", tensors={TOKENS: values.view(len(values), layers, 2, heads, -1)})


def refuse_other_models_tokens(extra: ExtraModules, model: "PreTrainedModel", directory: Path) -> None:
    """InputError for virtual tokens of another size than the model's; of a prefix, as far as its config says it."""
    tokens, config = extra.virtual(), model.config.get_text_config()
    if tokens is None:
        return
    if tokens.kind == "prompt":
        result, wanted = {"width": tokens.values.shape[1]}, {"width": model.get_input_embeddings().get_parameter("weight").shape[1]}
    else:
        _, layers, _, heads, width = tokens.values.shape
        result = {"layers": layers, "key-value heads": heads, "head width": width}
        known = {"key-value heads": getattr(config, "num_key_value_heads", None), "head width": getattr(config, "head_dim", None)}
        wanted = {"layers": config.num_hidden_layers} | (known if all(known.values()) else {})
    for name, number in wanted.items():
        if result[name] != number:
            raise InputError(
                f"{directory / ADAPTER}: its virtual tokens have {name} {result[name]}, the model of {directory / BASE} has {number}; "
                "the two belong to different models"
            )


def _check_config(adapter: Path, config: Mapping[str, object]) -> None:
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise InputError(
            f"{adapter}: only virtual tokens and plain LoRA adapters are read, without DoRA and modules_to_save (this one: {config.get('peft_type')})"
        )
    if config.get("bias", "none") != "none":
        raise InputError(f"{adapter}: the adapter replaces biases (bias {config['bias']!r}); merge it with PEFT first")


def _scaling(adapter: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    try:
        own = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    except re.error as error:
        raise InputError(f"{adapter / SETTINGS}: alpha_pattern holds no regular expression ({error})") from error
    alpha = next((a for a in (own, config.get("lora_alpha")) if a is not None), rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_ALPHA:
        raise InputError(f"{adapter / SETTINGS}: alpha {alpha!r} for {module}; a number of at most {LARGEST_ALPHA:g} was expected")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _joined(base: Checkpoint, module: str, up: Stored, down: Stored, scaling: float) -> StoredWeight:
    up_OR = up.load() if scaling == 1 else up.load() * scaling
    low_rank = LowRank(up_OR, down.load())
    if module in base.linears:
        record = base.linears[module]
    else:
        weight = base.tensors[f"{module}.weight"]
        record = StoredWeight(DenseWeight(weight.t() if module in base.transposed else weight))
    if record.shape != (up.shape[0], down.shape[1]):
        raise InputError(
            f"{up.file}: the adapter of {module} is {up.shape[0]} × {down.shape[1]}, the base {record.shape[0]} × {record.shape[1]}"
        )
    return replace(record, low_rank=low_rank)


def _entry(stored: Mapping[str, Stored], name: str, file: Path) -> Stored:
    if name not in stored:
        raise InputError(f"{file}: tensor {name} is missing")
    if stored[name].dtype not in FLOATING:
        raise InputError(f"{file}: {name} is stored as {stored[name].dtype}; one of {', '.join(FLOATING)} was expected")
    return stored[name]


def _factors(name: str, low_rank: LowRank) -> tuple[Tensor, Tensor]:
    if expert_parameter(name) is not None:
        raise UsageError(f"{name}: PEFT reaches linears, not fused experts; --format dense adds their low-rank term in")
    up, down = low_rank.up, low_rank.down
    return (up.dense() if isinstance(up, UniformWeight) else up), (down.dense() if isinstance(down, UniformWeight) else down)


def _named(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    out = {}
    for name, (up, down) in factors.items():
        out[f"{PREFIX}{name}.lora_A.weight"], out[f"{PREFIX}{name}.lora_B.weight"] = down.contiguous(), up.contiguous()
    return out


def _without(linears: Mapping[str, StoredWeight], name: str) -> StoredWeight:
    return replace(linears[name], low_rank=None)


def _is_quantized(low_rank: LowRank | None) -> bool:
    return low_rank is not None and (isinstance(low_rank.up, UniformWeight) or isinstance(low_rank.down, UniformWeight))
