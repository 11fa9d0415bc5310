"""Perplexity, and what goes with it: one function, one place.

exp of the mean negative log-likelihood over the seq_len − 1 predicted tokens of non-overlapping windows; bits per byte; KL to the
baseline and top-1 agreement with it. Streams the model block by block. Knows no stages.
Legend: N windows, T tokens, D model width, V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from . import artifact
from .blocks import StreamedModel
from .data import Windows
from .devices import Compute
from .errors import InputError
from .rundir import RunDirectory
from .surroundings import compute_of

TOKENS_AT_ONCE = 2048
LOGITS_AT_ONCE = 512

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """Per window: mean NLL in nats over its predicted tokens and, against a teacher, mean KL(teacher ‖ model) and top-1 agreement.
    Where only some tokens count, a window's sum is over those, divided by how many of them a window has on average, so that the mean over
    windows is the mean over counted tokens."""

    nll: tuple[float, ...]
    kl: tuple[float, ...] | None
    top1: tuple[float, ...] | None

    @property
    def perplexity(self) -> float:
        mean = math.fsum(self.nll) / len(self.nll)
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Teacher:
    """The baseline as a teacher: its last blocks' outputs [N, T, D] for the same windows, and the head that reads them."""

    hidden_NTD: Tensor
    logits: Callable[[Tensor], Tensor]


def batches(count: int, seq_len: int, tokens: int = TOKENS_AT_ONCE) -> Iterator[slice]:
    """Slices over windows that hold about `tokens` tokens each."""
    size = max(1, tokens // seq_len)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def last_hidden(model: StreamedModel, ids_NT: Tensor, progress: Progress | None = None) -> Tensor:
    """[N, T, D] hidden states that leave the last block, in the model's dtype on its device; one block in memory at a time."""
    parts = list(batches(*ids_NT.shape))
    hidden = [model.embed(ids_NT[part]) for part in parts]
    with torch.no_grad():
        for index in range(model.structure.blocks):
            model.load_block(index)
            hidden = [model.run_block(index, h) for h in hidden]
            model.unload_block(index)
            if progress is not None:
                progress(index + 1, model.structure.blocks)
    return torch.cat(hidden)


def score(
    model: StreamedModel, windows: Windows, teacher: Teacher | None = None, progress: Progress | None = None
) -> tuple[Scores, Tensor]:
    """Scores of the model on the windows' counted tokens, and its last hidden states [N, T, D]. InputError when none counts."""
    ids_NT, counts_NT = windows.ids, counted(windows)
    average = float(counts_NT.double().sum(1).mean())
    if not average:
        raise InputError("the evaluation windows hold no token of a completion; give more text, or a larger evaluation.windows")
    hidden = last_hidden(model, ids_NT, progress)
    finite_N = torch.isfinite(hidden).flatten(1).all(1)
    if not bool(finite_N.all()):
        raise InputError(f"{model.artifact.directory.name}: {_first_non_finite(model, ids_NT[~finite_N.cpu()])}")
    nll, kl, top1 = [], [], []
    with torch.no_grad():
        for index in range(len(ids_NT)):
            sums = torch.zeros(3, dtype=torch.float64)
            for start in range(0, ids_NT.shape[1] - 1, LOGITS_AT_ONCE):
                span = slice(start, min(start + LOGITS_AT_ONCE, ids_NT.shape[1] - 1))
                next_T = ids_NT[index, span.start + 1 : span.stop + 1]
                sums += _window_sums(model, hidden[index : index + 1, span], next_T, counts_NT[index, span], teacher, index, span)
            means = (sums / average).tolist()
            if not math.isfinite(means[0]):
                raise InputError(f"{model.artifact.directory.name}: {_first_non_finite(model, ids_NT[index : index + 1])}")
            nll.append(means[0])
            kl.append(means[1])
            top1.append(means[2])
    return Scores(tuple(nll), tuple(kl) if teacher else None, tuple(top1) if teacher else None), hidden


def counted(windows: Windows) -> Tensor:
    """bool [N, T − 1]: the predicted tokens that count."""
    return torch.ones_like(windows.ids[:, 1:], dtype=torch.bool) if windows.loss is None else windows.loss[:, 1:]


def _window_sums(
    model: StreamedModel, hidden_1TD: Tensor, next_T: Tensor, counts_T: Tensor, teacher: Teacher | None, index: int, span: slice
) -> Tensor:
    """float64 [3]: NLL, KL and top-1 agreement summed over the counted tokens of a span of one window."""
    out = torch.zeros(3, dtype=torch.float64)
    hidden_1TD, next_T = hidden_1TD[:, counts_T.to(hidden_1TD.device)], next_T[counts_T]
    if not len(next_T):
        return out
    logits_TV = model.logits(hidden_1TD)[0].float()
    log_p = torch.log_softmax(logits_TV, -1)
    out[0] = -log_p.gather(-1, next_T.to(log_p.device).unsqueeze(-1)).double().sum().cpu()
    if teacher is not None:
        theirs_1TD = teacher.hidden_NTD[index : index + 1, span][:, counts_T].to(hidden_1TD)
        reference = torch.log_softmax(teacher.logits(theirs_1TD)[0].float(), -1)
        out[1] = torch.nn.functional.kl_div(log_p, reference, log_target=True, reduction="none").sum(-1).double().sum().cpu()
        out[2] = (logits_TV.argmax(-1) == reference.argmax(-1)).double().sum().cpu()
    return out


def _first_non_finite(model: StreamedModel, ids_NT: Tensor) -> str:
    """Name where NaN or Inf first appears in windows that end in it: a weight, or a block's output."""
    for name, tensor in model.rest().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or Inf; repair the checkpoint or give another one"
    with torch.no_grad():
        hidden = model.embed(ids_NT[:1])
        for index in range(model.structure.blocks):
            block = model.load_block(index)
            for name, parameter in block.named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    return f"{model.structure.prefix}.{index}.{name} holds NaN or Inf; repair the checkpoint or give another one"
            hidden = model.run_block(index, hidden)
            model.unload_block(index)
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


def save_scores(path: Path, scores: Scores, windows: Windows, extra: dict[str, Any]) -> None:
    """One JSON file for one artifact under one protocol."""
    record = {"protocol": windows.protocol, "nll": scores.nll, "kl": scores.kl, "top1": scores.top1, **extra}
    artifact.write_json(path, record)


def load_scores(path: Path) -> tuple[Scores, dict[str, Any]] | None:
    """None when not measured yet."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        kl, top1 = record["kl"], record["top1"]
        return Scores(tuple(record["nll"]), kl and tuple(kl), top1 and tuple(top1)), record
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a measurement of this program ({error}); delete it and run again") from error


def save_hidden(path: Path, hidden_NTD: Tensor) -> None:
    artifact.write_bytes(path, save({"hidden": hidden_NTD.detach().cpu().contiguous()}))


def load_hidden(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor("hidden")
    except safetensors.SafetensorError:
        return None  # a cache: measured again


def bits_per_byte(scores: Scores, windows: Windows) -> float | None:
    """Total bits over the UTF-8 bytes of the predicted text that counts; None where the protocol does not know the bytes."""
    size = windows.protocol.get("bytes" if windows.loss is None else "loss_bytes")
    if not size:
        return None
    tokens = int(counted(windows).sum())
    return math.fsum(scores.nll) / len(scores.nll) * tokens / math.log(2) / size


def evaluate(
    model: str, *, eval_source: str | None = None, seq_len: int | None = None, windows: int | None = None, device: str = "auto",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a model or artifact with its protocol, for `pipeline eval`. Inside a run its own text, cut as the run cuts it, unless
    another text, length or number is asked for."""
    from . import data
    from .loading import binder_of, opened
    from .logs import bar
    from .models import load_tokenizer
    from .recipe import resolve

    run = run_of(Path(model))
    recipe = None if run is None else resolve(str(run.recipe))
    compute = compute_of(run, device, dtype or (recipe.dtype if recipe is not None else "auto"))
    with opened(model) as found:
        tokenizer = load_tokenizer(found.directory)
        if recipe is not None and eval_source in (None, recipe.data.evaluation):
            from .inputs import Inputs

            asked = {"seq_len": seq_len or recipe.evaluation.seq_len, "windows": windows or recipe.evaluation.windows}
            cut = Inputs(recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=asked)}), found.directory).evaluation()
        else:
            documents = data.load_text(eval_source or "demo", "evaluation", tokenizer=tokenizer)
            cut = data.tokenize(documents, tokenizer, seq_len or 512, windows)
        cut = evaluated_by(compute, cut)
        streamed = StreamedModel(found, compute.device, compute.dtype, binder_of(found, compute.device))
        with bar("perplexity, blocks", streamed.structure.blocks) as shown:
            scores, _ = score(streamed, cut, None, lambda done, total: shown.advance())
        return {
            "model": model,
            "perplexity": scores.perplexity,
            "bits_per_byte": bits_per_byte(scores, cut),
            "total_bytes": found.total_bytes(),
            "protocol": cut.protocol,
        }


def run_of(place: Path) -> RunDirectory | None:
    """The run that `place` is or lies in, or None."""
    place = place.expanduser().absolute()
    found = (RunDirectory(directory) for directory in ((place, *place.parents) if place.is_dir() else ()))
    return next((run for run in found if (run.path / "run.json").is_file() and run.recipe.is_file()), None)
