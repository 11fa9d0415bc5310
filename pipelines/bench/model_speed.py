"""`pipeline bench generate --shape NAME [--blocks N]`: a whole model of real size and random weights, on the kernels and in bfloat16.

decode writes token after token, one CUDA graph each on a card; prefill reads 2,048 tokens at once. Models are made where they run, from
records, without files or stages, since only speed is measured. One variant at a time, kept in a journal, from which a stopped benchmark resumes.
Knows shapes, records and the kernels' binder; not how a compressed model comes about.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...compress.integer_scales import with_integer_scales
from ...compress.weights import ActivationGrid, LowRank, StoredWeight, UniformWeight
from ...kernels.choices import device_name
from ...kernels.journal import Journal
from ...kernels.linear import resident_bytes
from ...reports.json_values import real
from ..devices.compute import chosen_device
from ..errors import UsageError
from ..models.binding import KernelBinder
from ..models.decoding import cuda_graph, decode, graphable
from ..models.structure import inspect, set_parameter, skeleton
from ..recipes.settings import unknown
from .scaling import Row
from .synthetic import SHAPES, Shape, config_of

log = logging.getLogger(__name__)

PROMPT, NEW_TOKENS, READ = 16, 64, 2048
GROUP = 64
JOURNAL = "bench-generate-shape.journal"


@dataclass(frozen=True)
class Form:
    """How the matrices of a model are stored: on a 4-bit grid with a low-rank term; `rounds` their inputs to 8 bits, one scale a token, the
    weights' scales then of two levels."""

    rank: int = 0
    rounds: bool = False


VARIANTS: Mapping[str, Form | None] = {
    "bfloat16": None, "4 bits": Form(), "4 bits, rank 32": Form(32), "W4A8, two levels, rank 32": Form(32, rounds=True),
}  # fmt: skip


def of_shape(name: str, blocks: int | None, only: Sequence[str], device: str, repeats: int, output: Path | None) -> list[Row]:
    """A row for each variant (or those of `only`) and each of decode and prefill. UsageError for a shape or a variant that is not known."""
    if name not in SHAPES:
        raise UsageError(f"--shape: {unknown('shape', name, SHAPES)}")
    for variant in only:
        if variant not in VARIANTS:
            raise UsageError(f"bench generate --shape: {unknown('variant', variant, VARIANTS)}")
    shape = SHAPES[name] if blocks is None else replace(SHAPES[name], blocks=blocks)
    place = chosen_device(device)
    context = {"device": device_name(place), "torch": torch.__version__, "shape": asdict(shape), "repeats": repeats, "tokens": [PROMPT, NEW_TOKENS, READ]}
    journal = Journal(None if output is None else output / JOURNAL, context)
    rows: list[Row] = []
    for variant, form in VARIANTS.items():
        if only and variant not in only:
            continue
        if variant not in journal:
            journal.add(variant, {"rows": [{"shape": name, "blocks": shape.blocks} | row for row in measured(variant, form, shape, place, repeats)]})
        rows += journal[variant]["rows"]
    journal.close()
    return relative_to_bfloat16(rows)


def relative_to_bfloat16(rows: Sequence[Row]) -> list[Row]:
    """The rows with `times_bfloat16`: their milliseconds over bfloat16's, where that was measured."""
    plain = {row["regime"]: real(row["milliseconds"]) for row in rows if row["variant"] == "bfloat16"}
    return [row | ({"times_bfloat16": round(real(row["milliseconds"]) / plain[row["regime"]], 3)} if row["regime"] in plain else {}) for row in rows]


def measured(variant: str, form: Form | None, shape: Shape, place: torch.device, repeats: int) -> list[Row]:
    """Two rows of one variant; its model is gone afterwards."""
    model, backends = made(shape, form, place)
    wait: Callable[[], None] = (lambda: torch.cuda.synchronize(place)) if place.type == "cuda" else lambda: None
    common = {"resident_bytes": resident_bytes(model), "backends": backends}
    rows = []
    for regime, tokens, seconds in (("decode", 1, _decode(model, place)), ("prefill", _readable(shape), _prefill(model, shape, place, wait, repeats))):
        row = {"variant": variant, "regime": regime, "tokens": tokens, "tokens_per_second": tokens / statistics.median(seconds)}
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 2 else None
        spread = None if quartiles is None else 1e3 * (quartiles[2] - quartiles[0])
        rows.append(row | {"milliseconds": 1e3 * statistics.median(seconds), "spread": spread, "repeats": len(seconds)} | common)
        log.info("%s, %s: %.4g ms", variant, regime, rows[-1]["milliseconds"])
    del model
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def made(shape: Shape, form: Form | None, place: torch.device) -> tuple[PreTrainedModel, str]:
    """(the model in bfloat16 on `place`, which backends its matrices run on); every block has memory of its own."""
    draw = torch.Generator(place).manual_seed(0)
    model = skeleton(config_of(shape))
    structure = inspect(model)

    def fill(prefix: str = "", without: str | None = None) -> None:
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta and name.startswith(prefix) and not (without and name.startswith(without)):
                set_parameter(model, name, _drawn(parameter.shape, draw, place))

    fill(without=f"{structure.prefix}.")
    for name, buffer in list(model.named_buffers()):
        set_parameter(model, name, buffer.to(place))
    binder = KernelBinder("auto", place)
    records: dict[tuple[int, int], StoredWeight] = {}
    for index in range(structure.blocks):
        prefix = f"{structure.prefix}.{index}."
        if form is not None:
            sites = [site for site in structure.sites if site.block == index]
            records |= {site.shape: record(site.shape, form, draw, place) for site in sites if site.shape not in records}
            binder(model, prefix, {site.name: records[site.shape] for site in sites})
        fill(prefix)
    model.config.use_cache = True
    model.generation_config.eos_token_id = None
    return model, ", ".join(f"{name} {count}" for name, count in sorted(binder.backends.items()))


def _drawn(size: torch.Size, draw: torch.Generator, place: torch.device) -> Tensor:
    """As `synthetic` draws it, but on the device: norms are 1."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16, device=place)
    return torch.empty(size, dtype=torch.bfloat16, device=place).normal_(std=size[1] ** -0.5, generator=draw)


def record(shape: tuple[int, int], form: Form, draw: torch.Generator, place: torch.device) -> StoredWeight:
    """Random codes, scales, zero points and factors of the size that they have in a model."""
    (rows, columns), groups = shape, shape[1] // GROUP
    codes = torch.randint(0, 16, shape, generator=draw, device=place)
    zeros = torch.randint(6, 10, (rows, groups), generator=draw, device=place)
    scales = (torch.rand(rows, groups, generator=draw, device=place) + 0.5) / 5 / columns**0.5
    base = UniformWeight.from_codes(codes, scales.half(), zeros, 4, GROUP)
    low_rank = None
    if form.rank:
        up, down = _drawn(torch.Size((rows, form.rank)), draw, place), _drawn(torch.Size((form.rank, columns)), draw, place)
        low_rank = LowRank(up / 4, down)
    if form.rounds:
        return StoredWeight(with_integer_scales(base), low_rank=low_rank, activations=ActivationGrid(8, -1))
    return StoredWeight(base, low_rank=low_rank)


def _decode(model: PreTrainedModel, place: torch.device) -> list[float]:
    """Seconds of each token after the second, its choice from the logits included. UsageError where no graph of a token can be replayed."""
    length = PROMPT + NEW_TOKENS + 2
    on_card = place.type == "cuda"
    if on_card and (why := graphable(model, length)):
        raise UsageError(f"bench generate --shape: a token is one CUDA graph, and this model's cannot be recorded: {why}")
    prompt = torch.arange(PROMPT, device=place).remainder(model.config.vocab_size).unsqueeze(0)
    tokens = decode(model, prompt, NEW_TOKENS + 2, lambda logits: int(logits.argmax()), cuda_graph if on_card else lambda step: step)
    for _ in range(2):  # the prompt is read; the graph is recorded
        next(tokens)
    seconds = []
    for _ in range(NEW_TOKENS):
        begun = time.perf_counter()
        next(tokens)
        seconds.append(time.perf_counter() - begun)
    tokens.close()  # type: ignore[attr-defined]
    return seconds


def _readable(shape: Shape) -> int:
    return min(READ, shape.positions)


@torch.no_grad()
def _prefill(model: PreTrainedModel, shape: Shape, place: torch.device, wait: Callable[[], None], repeats: int) -> list[float]:
    ids = torch.arange(_readable(shape), device=place).remainder(shape.vocabulary).unsqueeze(0)
    seconds = []
    for _ in range(repeats + 1):  # the first one compiles and tunes
        wait()
        begun = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        wait()
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]
