"""Checks of a recovery stage before any work: what will be refused, and the bytes of its extra modules. Reads configs, no weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...recover.bottlenecks import SerialAdapter, sublayers
from ...recover.fits import misfit, virtual_tokens
from ...recover.prompts import MamAdapter, PrefixTuning
from ...recover.recovery_methods import RECOVER, refusal
from ...recover.selection import where
from ..models.sizes import Size, Sizes
from ..models.source import load_config, positions, resolve_model
from ..recipes.mixture import SELF, parse_mixture
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def refusals(spec: StageSpec, recipe: Recipe, model: "PreTrainedModel", sizes: Sizes, imported: bool) -> list[str]:
    """Why a recover stage cannot be, one line each. `model` is a skeleton, `sizes` what the stages before it will have made; of an
    `imported` checkpoint only shapes are known."""
    config = spec.config
    linears = {s.name: s for s in sizes.structure.sites if s.block is not None}
    made = {name: _kinds(sizes.of[name]) for name in linears}
    shapes = {name: site.shape for name, site in linears.items()}
    reason = misfit(config, model, shapes, frozenset(n for n, kinds in made.items() if "low_rank" in kinds))
    result = [] if reason is None else [f"{spec.method}: {reason}"]
    if not result and not imported:
        place = where(model, config.targets, config.layers)
        reason = refusal(spec.method, [kinds for name, kinds in made.items() if place.linear(name)], spec.config)
        result = [] if reason is None else [reason]
    result += _tables(config, sizes) + _tokens(spec, recipe, model)
    by_block = RECOVER[spec.method].by_block
    if by_block and imported and recipe.teacher is None:
        result.append(f"{spec.method} imitates dense blocks, and the model came quantized: give the dense one with --teacher")
    loss, from_self = getattr(config, "loss", None), SELF in [share.source for share in parse_mixture(recipe.data.train)]
    if from_self and (loss == "cross_entropy" or (imported and recipe.teacher is None)):
        why = "loss: cross_entropy" if loss == "cross_entropy" else "the model came quantized and no --teacher was given"
        result.append(f"--train {SELF}: what the dense model writes teaches by imitation alone, and {why}; leave {SELF} out of the sources")
    if recipe.teacher is not None and loss != "cross_entropy":
        result += _teacher_differs(model.config, resolve_model(recipe.teacher), by_block)
    return [f"{spec.address}: {line}" for line in result]


def extra_bytes(spec: StageSpec, model: Any, sizes: Sizes) -> int:
    """Bytes of the extra modules that a method adds to the model, in float32."""
    config = spec.config
    if "stored with the model" not in RECOVER[spec.method].ways.stored_as:
        return 0
    text, count = model.config.get_text_config(), 0
    if isinstance(config, PrefixTuning | MamAdapter):
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        count += config.tokens * sizes.structure.blocks * 2 * heads * width
    elif virtual_tokens(config):
        count += config.tokens * model.get_input_embeddings().weight.shape[1]
    bottleneck = getattr(config, "bottleneck", None)
    if bottleneck is not None:
        shapes = {s.name: s.shape for s in sizes.structure.sites if s.block is not None and s.expert is None}
        place = where(model, config.targets, config.layers)
        chosen = {name for name in shapes if place.linear(name)}
        for part in sublayers(list(shapes), chosen, place.blocks_name, getattr(config, "at", "mlp")):
            width_out = shapes[part.exit][0]
            width_in = width_out if isinstance(config, SerialAdapter) else shapes[part.entry][1]
            count += bottleneck * (width_in + width_out + 1) + width_out
    return 4 * count


def _kinds(size: Size) -> frozenset[str]:
    """As `recover.site.kinds` will find them; factors whose grid is still open may come to lie on one."""
    details = {"double_quantized"} if "base.absmax_codes" in size.base_names else set()
    parts = {"base.scales": "uniform", "base.super_scales": "ggml", "base.codes": "normal_float"}
    base = next((kind for part, kind in parts.items() if part in size.base_names), "dense")
    on_grid = size.open_factors or any(name.endswith(".codes") for name in size.factor_names)
    details |= {"quantized_factors"} if size.low_rank and on_grid else set()
    details |= {"activations"} if size.rounds_inputs else set()
    return frozenset({base} | details | ({"masked"} if size.mask else set()) | ({"low_rank"} if size.low_rank else set()))


def _tables(config: object, sizes: Sizes) -> list[str]:
    """Embeddings and head can train where they are plain."""
    in_blocks = {s.name for s in sizes.structure.sites if s.block is not None}
    compressed = any(size.compressed for name, size in sizes.of.items() if name not in in_blocks)
    if compressed and (getattr(config, "head", False) or getattr(config, "embeddings", False)):
        return [
            "the head is compressed and cannot train as a plain tensor; set head and embeddings to false, or compress without include_head"
        ]
    return []


def _tokens(spec: StageSpec, recipe: Recipe, model: "PreTrainedModel") -> list[str]:
    """Virtual tokens take positions from every text, and stand in front once."""
    count, limit = virtual_tokens(spec.config), positions(model.config)
    if not count:
        return []
    result = []
    length = recipe.evaluation.seq_len
    if limit is not None and length + count > limit:
        result.append(
            f"{count} virtual tokens and evaluation.seq_len {length} are above the {limit} positions of this model; choose fewer of either"
        )
    before = recipe.stages[: next(i for i, s in enumerate(recipe.stages) if s.address == spec.address)]
    other = next((s for s in before if s.name == "recover" and virtual_tokens(s.config)), None)
    if other is not None:
        result.append(f"{spec.method} trains virtual tokens, and {other.address} puts some in front already: use one of them")
    return result


def _teacher_differs(config: "PreTrainedConfig", teacher: Path, by_block: bool) -> list[str]:
    """A teacher must speak the same vocabulary; where it teaches block by block, have the same blocks."""
    ours, theirs = config.get_text_config(), load_config(teacher).get_text_config()
    advice = "give the dense model that this one was made from"
    if ours.vocab_size != theirs.vocab_size:
        return [f"--teacher: its vocabulary has {theirs.vocab_size} tokens, the model's has {ours.vocab_size}; {advice}"]
    sizes = [(c.hidden_size, c.num_hidden_layers) for c in (theirs, ours)]
    if by_block and sizes[0] != sizes[1]:
        return ["--teacher: width and blocks are {} and {}, the model's {} and {}; {}".format(*sizes[0], *sizes[1], advice)]
    return []
