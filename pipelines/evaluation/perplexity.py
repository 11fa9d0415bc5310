"""Perplexity, bits per byte, KL divergence and top-1 agreement of a model streamed block by block.

exp of the mean negative log-likelihood over the seq_len − 1 predicted tokens of non-overlapping windows; bits per byte; KL to the
baseline and top-1 agreement with it. Streams the model block by block. Knows no stages.
Legend: N windows, T tokens, D model width, V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ...recover.losses import tiles
from ..devices.compute import Compute
from ..errors import InputError
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates, Room
from ..models.sharding import BatchShare
from ..models.state_checkpoints import Checkpoints
from ..ranks.exchange import ONE, Ranks
from ..text.data import Windows
from .scores import Scores

TOKENS_AT_ONCE = 2048
LOGITS_AT_ONCE = 512

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BaselineOutputs:
    """The baseline as a teacher: its last block's outputs for the same windows, read one [T, D] at a time, and the head that reads them."""

    hidden_TD: Callable[[int], Tensor]
    logits: Callable[[Tensor], Tensor]


def batches(count: int, seq_len: int) -> Iterator[slice]:
    """Slices over windows that hold about TOKENS_AT_ONCE tokens each."""
    size = max(1, TOKENS_AT_ONCE // seq_len)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def embedded(model: StreamedModel, ids_NT: Tensor, room: Room, mine: Callable[[int], bool] | None = None) -> HiddenStates:
    """The hidden states that enter the first block, in batches of about TOKENS_AT_ONCE tokens: all, or those whose number is `mine`."""
    parts = (part for number, part in enumerate(batches(*ids_NT.shape)) if mine is None or mine(number))
    return HiddenStates.of((model.embed(ids_NT[part]) for part in parts), room)


def last_states(
    model: StreamedModel, texts: Mapping[str, Tensor], room: Room, progress: Progress | None = None, ranks: Ranks = ONE, scratch: Path | None = None
) -> dict[str, HiddenStates]:
    """The hidden states that leave the last block, in the model's dtype, of each text [N, T]. One block is in memory at a time, and is loaded
    once for all texts. Several ranks: those of a rank's own batches. With a `scratch` a killed walk goes on from there, as long as the texts are
    the same; the caller forgets what lies in it."""
    blocks, begun, states = model.structure.blocks, 0, dict[str, HiddenStates]()
    checkpoints = None if scratch is None else _checkpoints(texts, scratch, ranks)
    if checkpoints is not None and (begun := checkpoints.latest(blocks)):
        states = checkpoints.load(begun, room)
    states = states or {name: embedded(model, ids_NT, room, ranks.owns) for name, ids_NT in texts.items()}
    progress = progress or (lambda done, total: None)
    for done in range(begun):
        progress(done + 1, blocks)
    with torch.no_grad():
        for index in model.walk(first=begun):
            for of_text in states.values():
                of_text.through(partial(model.run_block, index))
            if checkpoints is not None:
                checkpoints.keep(index + 1, states)
            progress(index + 1, blocks)
    return states


def _checkpoints(texts: Mapping[str, Tensor], scratch: Path, ranks: Ranks) -> Checkpoints:
    """Those of an evaluation of these texts [N, T]: a batch belongs to the rank that owns its number."""
    counts = {name: len([*batches(*ids_NT.shape)]) for name, ids_NT in texts.items()}
    return Checkpoints(scratch, {name: BatchShare(count, ranks, count) for name, count in counts.items()})


def last_hidden(model: StreamedModel, ids_NT: Tensor) -> Tensor:
    """The same of a few windows as one [N, T, D]."""
    return last_states(model, {"": ids_NT}, Room(model.device))[""].whole()


def score(
    model: StreamedModel,
    windows: Windows,
    teacher: BaselineOutputs | None = None,
    progress: Progress | None = None,
    room: Room | None = None,
    ranks: Ranks = ONE,
) -> tuple[Scores, HiddenStates]:
    """`score_texts` of one text."""
    return score_texts(model, {"": (windows, teacher)}, progress, room, ranks)[""]


def score_texts(
    model: StreamedModel,
    texts: Mapping[str, tuple[Windows, BaselineOutputs | None]],
    progress: Progress | None = None,
    room: Room | None = None,
    ranks: Ranks = ONE,
    scratch: Path | None = None,
) -> dict[str, tuple[Scores, HiddenStates]]:
    """Scores of the model on each text's counted tokens, and its last hidden states, which take `room` (default: all there is). InputError
    when no token counts, or a number is not finite. Several ranks: a batch belongs to one, whose hidden states are of its own batches; the
    scores are all. `scratch` as in `last_states`."""
    for windows, _ in texts.values():
        if not bool(counted(windows).any()):
            raise InputError("the evaluation windows hold no token of a completion; give more text, or a larger evaluation.windows")
    ids = {name: windows.ids for name, (windows, _) in texts.items()}
    states = last_states(model, ids, room or Room(model.device), progress, ranks, scratch)
    return {name: (_scored(model, states[name], *text, ranks), states[name]) for name, text in texts.items()}


def _scored(model: StreamedModel, states: HiddenStates, windows: Windows, teacher: BaselineOutputs | None, ranks: Ranks) -> Scores:
    """The scores of a text whose last hidden states these are."""
    ids_NT, counts_NT = windows.ids, counted(windows)
    average = float(counts_NT.double().sum(1).mean())
    own = [part for number, part in enumerate(batches(*ids_NT.shape)) if ranks.owns(number)]
    result: dict[int, list[float]] = {}
    wrong: str | None = None
    with torch.no_grad():
        for part, batch_NTD in zip(own, states, strict=True):
            for index, hidden_TD in enumerate(batch_NTD, part.start):
                sums = _window(model, hidden_TD, ids_NT[index], counts_NT[index], teacher, index)
                result[index] = (sums / average).tolist()
                if not math.isfinite(result[index][0]) or not bool(torch.isfinite(hidden_TD).all()):
                    wrong = _first_non_finite(model, ids_NT[index : index + 1])
                    break
            if wrong is not None:
                break
    if wrong := next(filter(None, ranks.gathered(wrong)), None):
        raise InputError(f"{model.artifact.directory.name}: {wrong}")
    nll, kl, top1 = zip(*ranks.in_order(result).values(), strict=True)
    return Scores(nll, kl if teacher else None, top1 if teacher else None)


def whole_states(states: HiddenStates, windows: Windows, ranks: Ranks, room: Room) -> HiddenStates | None:
    """Of what `score` left on every rank, all batches in their order on rank 0; None on the others."""
    if ranks.size == 1:
        return states
    result = HiddenStates.of(ranks.streamed(states, len(list(batches(*windows.ids.shape)))), room)
    return result if ranks.leads else None


def _window(
    model: StreamedModel, hidden_TD: Tensor, ids_T: Tensor, counts_T: Tensor, teacher: BaselineOutputs | None, index: int
) -> Tensor:
    """float64 [3]: NLL, KL and top-1 agreement summed over the counted tokens of a window, a span of tokens at a time."""
    sums = torch.zeros(3, dtype=torch.float64)
    theirs_TD = None if teacher is None else teacher.hidden_TD(index)
    for start in range(0, len(ids_T) - 1, LOGITS_AT_ONCE):
        span = slice(start, min(start + LOGITS_AT_ONCE, len(ids_T) - 1))
        wanted_T, next_T = counts_T[span], ids_T[span.start + 1 : span.stop + 1]
        taught = None if teacher is None or theirs_TD is None else (teacher, theirs_TD[span])
        sums += _span_sums(model, hidden_TD[span], next_T, wanted_T, taught)
    return sums


def counted(windows: Windows) -> Tensor:
    """bool [N, T − 1]: the predicted tokens that count."""
    return torch.ones_like(windows.ids[:, 1:], dtype=torch.bool) if windows.loss is None else windows.loss[:, 1:]


def _span_sums(
    model: StreamedModel, hidden_TD: Tensor, next_T: Tensor, counts_T: Tensor, taught: tuple[BaselineOutputs, Tensor] | None
) -> Tensor:
    """The same of a span of one window; `taught`: the teacher, and its hidden states of the span."""
    out = torch.zeros(3, dtype=torch.float64)
    hidden_1TD, next_T = hidden_TD[counts_T.to(hidden_TD.device)].unsqueeze(0), next_T[counts_T]
    if not len(next_T):
        return out
    logits_TV, reference_TV = model.logits(hidden_1TD)[0], None
    if taught is not None:
        teacher, theirs_TD = taught
        reference_TV = teacher.logits(theirs_TD[counts_T.to(theirs_TD.device)].unsqueeze(0).to(hidden_1TD))[0]
    next_T = next_T.to(logits_TV.device)
    for rows in tiles(logits_TV):
        out += _row_sums(logits_TV[rows].float(), next_T[rows], None if reference_TV is None else reference_TV[rows].float()).cpu()
    return out


def _row_sums(logits_TV: Tensor, next_T: Tensor, reference_TV: Tensor | None) -> Tensor:
    """float64 [3] of float32 logits and the teacher's, on their device."""
    log_p = torch.log_softmax(logits_TV, -1)
    out = [-log_p.gather(-1, next_T.unsqueeze(-1)).double().sum()]
    if reference_TV is not None:
        agree = (logits_TV.argmax(-1) == reference_TV.argmax(-1)).double().sum()
        reference = torch.log_softmax(reference_TV, -1)
        divergence_TV = torch.nn.functional.kl_div(log_p, reference, log_target=True, reduction="none")
        out += [divergence_TV.sum(-1).double().sum(), agree]
    return torch.nn.functional.pad(torch.stack(out), (0, 3 - len(out)))


def _first_non_finite(model: StreamedModel, ids_NT: Tensor) -> str:
    """Name where NaN or Inf first appears in windows that end in it: a weight, or a block's output."""
    for name, tensor in model.outside_blocks().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or Inf; repair the checkpoint or give another one"
    with torch.no_grad():
        hidden = model.embed(ids_NT[:1])
        for index in model.walk():
            for name, parameter in model.layers[index].named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    return f"{model.structure.prefix}.{index}.{name} holds NaN or Inf; repair the checkpoint or give another one"
            hidden = model.run_block(index, hidden)
            if not bool(torch.isfinite(hidden).all()):
                return f"{model.structure.prefix}.{index} puts out NaN or Inf although its weights are finite; try float32 (--device cpu)"
    return "the logits hold NaN or Inf although all weights are finite; try float32 (--device cpu)"


# -- measurements on disk --------------------------------------------------------------------------------------------------------


def evaluated_by(compute: Compute, windows: Windows) -> Windows:
    """The windows under a protocol that says how they are computed."""
    return replace(windows, protocol=windows.protocol | {"dtype": compute.dtype_name, "device": compute.device.type})


def protocol_key(windows: Windows) -> str:
    """Eight characters that name an evaluation protocol. A CPU in float32 goes without saying, as it did before a protocol named them."""
    protocol = dict(windows.protocol)
    if (protocol.get("dtype", "float32"), protocol.get("device", "cpu")) == ("float32", "cpu"):
        protocol = {name: value for name, value in protocol.items() if name not in ("dtype", "device")}
    return hashlib.sha256(json.dumps(protocol, sort_keys=True, default=str).encode()).hexdigest()[:8]


def hidden_reader(path: Path) -> Callable[[int], Tensor]:
    """window → its [T, D], of a file that is there; nothing else of it is read."""
    kept = safetensors.safe_open(path, framework="pt").get_slice("hidden")
    return lambda index: kept[index : index + 1][0]


def bits_per_byte(scores: Scores, windows: Windows) -> float | None:
    """Total bits over the UTF-8 bytes of the predicted text that counts; None where the protocol does not know the bytes."""
    size = windows.protocol.get("bytes" if windows.loss is None else "loss_bytes")
    if not size:
        return None
    tokens = int(counted(windows).sum())
    return math.fsum(scores.nll) / len(scores.nll) * tokens / math.log(2) / size
