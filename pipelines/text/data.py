"""Text for calibration, training, held-out checks and evaluation: loaded by part, tokenized once, cut into windows.

Knows parts, leaks, tokenizers and windows; every text and every window carries its protocol, so that a number can say what it was
measured on. Does not know models or stages.

Shapes: N windows, B batch, T tokens of a window.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ..errors import InputError, UsageError
from ..recipes.mixture import SELF
from .sources import Body, read
from .splits import PARTS, Document, Exclusion, split_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """A part's documents, the string that joins them, and what a report notes with a number measured on them."""

    documents: tuple[Document, ...]
    join: str
    protocol: dict[str, Any]

    @property
    def text(self) -> str:
        return self.join.join(document.text for document in self.documents)


@dataclass(frozen=True)
class Windows:
    """`ids` int64 [N, T]; `loss` bool [N, T] marks the tokens that count as targets, None: all. The first of a window never counts."""

    ids: Tensor
    loss: Tensor | None
    protocol: dict[str, Any]


def load_text(
    source: str,
    part: str,
    *,
    roles: Iterable[str] | None = None,
    tokenizer: Any = None,
    exclude: Exclusion | None = None,
    body: Body | None = None,
) -> Documents:
    """One part of a source: `demo` and its like (`demo.texts`), a local .txt/.raw/.md/.jsonl/.parquet, or a `datasets` id
    `ID[:CONFIG][:SPLIT]` (alias `wikitext2`); `body`: its text, if it has been read.

    `roles` are all parts that the user draws from this source, for which a file is split; None means `part` alone, which then
    gets all of it. The demo and official splits of data sets do not depend on it. `exclude` is text that must not occur.
    `tokenizer` is needed for rows with prompts or messages. Raises InputError.
    """
    if part not in PARTS:
        raise UsageError(f"unknown part of a text '{part}'; known are {', '.join(PARTS)}")
    body = body or read(source, part, tokenizer)
    try:
        parts, rule = split_documents(body.documents, body.roles or frozenset(roles or ()) | {part})
    except ValueError as error:
        raise InputError(f"{source}: {error}; give each part a source of its own") from error
    chosen, dropped, cut = parts[part], 0, 0
    if exclude is not None:
        chosen, dropped, cut = exclude.applied(chosen)
    if not any(document.text.strip() for document in chosen):
        lost = f" after {dropped} documents that occur in other parts were dropped" if dropped else ""
        raise InputError(
            f"{source}: nothing is left for {part}{lost} ({len(body.documents)} documents, {rule}); give it a source of its own"
        )
    protocol = {
        "dataset": body.dataset,
        "part": part,
        "split": body.split,
        "rule": rule,
        "documents": len(chosen),
        "dropped_documents": dropped,
        "dropped_lines": cut,
        "join": body.join,
        "fingerprint": _fingerprint(chosen, body.join),
    }
    return Documents(tuple(chosen), body.join, protocol)


class Parts:
    """The parts of a run's texts, each loaded on first use: `source` → its documents.

    Whatever the sources are, no document and no long line of an evaluation text (`also` are further ones) is in another part, and none of
    the held-out text, which comes from the training sources, in calibration or training. `written` gives the documents of the
    source `self`, which the model wrote.
    """

    def __init__(
        self,
        calibration: Iterable[str],
        train: Iterable[str],
        evaluation: str,
        also: Iterable[str] = (),
        tokenizer: Any = None,
        written: Callable[[], Body] | None = None,
    ) -> None:
        self.sources = {
            "evaluation": (evaluation, *also),
            "held_out": tuple(train),
            "calibration": tuple(calibration),
            "train": tuple(train),
        }
        self.tokenizer, self.written = tokenizer, written
        self._loaded: dict[str, dict[str, Documents]] = {}

    def __getitem__(self, part: str) -> dict[str, Documents]:
        if part not in self._loaded:
            before = ("evaluation", "held_out")[: PARTS.index(part)]
            excluded = [Exclusion.of(documents.documents) for other in before for documents in self[other].values()]
            self._loaded[part] = {source: self._load(source, part, excluded) for source in dict.fromkeys(self.sources[part])}
        return self._loaded[part]

    def _load(self, source: str, part: str, excluded: list[Exclusion]) -> Documents:
        roles = [other for other in PARTS if source in self.sources[other]]
        exclude = reduce(Exclusion.union, excluded, Exclusion.of(()))
        body = self.written() if source == SELF and self.written is not None else None
        return load_text(source, part, roles=roles, tokenizer=self.tokenizer, exclude=exclude, body=body)


def tokenize(
    documents: Documents, tokenizer: Any, seq_len: int, windows: int | None = None, *, seed: int | None = None, bos: str = "auto"
) -> Windows:
    """Join, tokenize once, cut into non-overlapping windows of `seq_len` tokens.

    windows: how many (all if None or if there are fewer); the first ones, or, given a `seed`, a sample in text order.
    bos: `none`; `start` (once, before the text); `window` (before each window, counted in seq_len); `auto`: what the tokenizer does
    to a text of its own accord, except Gemma's, which need it in each window.
    In the protocol `tokens` and `bytes` count all predicted text, `loss_tokens` and `loss_bytes` that of completions, where only they
    carry loss.
    Raises InputError where the text is shorter than one window, UsageError for a seq_len under 2 or an unknown `bos`.
    """
    if seq_len < 2 or (windows is not None and windows < 1):
        raise UsageError(f"seq_len {seq_len} and windows {windows}: at least 2 and 1 are needed")
    placed = _bos_rule(tokenizer, bos)
    ids, start_byte, end_byte, loss = _encode(documents, tokenizer, placed)
    body = seq_len - 1 if placed == "window" else seq_len
    chosen = _choose(documents, len(ids), seq_len, body, windows, seed)
    places = chosen[:, None] * body + numpy.arange(body)
    ids_NT, loss_NT = ids[places], loss[places]
    predicted = places if placed == "window" else places[:, 1:]
    if placed == "window":
        ids_NT = numpy.insert(ids_NT, 0, tokenizer.bos_token_id, axis=1)
        loss_NT = numpy.insert(loss_NT, 0, False, axis=1)
    completions_only = any(document.spans is not None for document in documents.documents)
    protocol = documents.protocol | {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "bos": placed,
        "seq_len": seq_len,
        "windows": len(chosen),
        "windows_available": len(ids) // body,
        "sample_seed": seed,
        "tokens": predicted.size,
        "loss_tokens": int(loss_NT[:, 1:].sum()) if completions_only else None,
        "bytes": int((end_byte[predicted] - start_byte[predicted]).sum()),
    }
    if completions_only:
        answered = predicted[loss[predicted]]
        protocol["loss_bytes"] = int((end_byte[answered] - start_byte[answered]).sum())
    return Windows(torch.from_numpy(ids_NT), torch.from_numpy(loss_NT) if completions_only else None, protocol)


def schedule(weights: Sequence[float]) -> Callable[[int], tuple[int, int]]:
    """index → (which source that draw is of, how many of the source came before): each draw is of the source that is furthest behind its
    weight, so that any beginning holds the weights as nearly as whole numbers can."""
    counts, drawn = [0] * len(weights), []

    def at(index: int) -> tuple[int, int]:
        while len(drawn) <= index:
            wanted = len(drawn) + 1
            chosen = max(range(len(weights)), key=lambda i: (weights[i] * wanted - counts[i], -i))
            drawn.append((chosen, counts[chosen]))
            counts[chosen] += 1
        return drawn[index]

    return at


def batch(windows: Windows, step: int, seed: int, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Ids [B, T] and loss mask [B, T] (None: all) of one optimizer step; depends on (seed, step) alone.

    The windows are drawn in shuffled epochs: none comes twice before all have come once.
    """
    count = len(windows.ids)
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        rows.append(_order(count, seed, epoch)[place])
    index = torch.stack(rows)
    return windows.ids[index], None if windows.loss is None else windows.loss[index]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (16 digits) of vocabulary, merges and normalization, not of the padding and truncation a caller may have set."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields.pop("padding", None)
    fields.pop("truncation", None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _bos_rule(tokenizer: "PreTrainedTokenizerBase", bos: str) -> str:
    if bos not in ("auto", "none", "start", "window"):
        raise UsageError(f"unknown bos '{bos}'; known are auto, none, start, window")
    if bos == "auto":
        probe = tokenizer("a", verbose=False)["input_ids"]
        adds = tokenizer.bos_token_id is not None and len(probe) > 0 and probe[0] == tokenizer.bos_token_id
        bos = ("window" if "gemma" in type(tokenizer).__name__.lower() else "start") if adds else "none"
    if bos != "none" and tokenizer.bos_token_id is None:
        raise UsageError(f"bos is '{bos}' but this tokenizer has no BOS token; set bos to none")
    return bos


def _encode(documents: Documents, tokenizer: Any, bos: str) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Token ids, the UTF-8 byte each begins and ends at, and whether each carries loss (it lies inside a span of its document)."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer {type(tokenizer).__name__}: no character offsets; convert it to a tokenizer.json ('fast') tokenizer")
    text = documents.text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    ids = numpy.asarray(encoded["input_ids"], dtype=numpy.int64)
    offsets = numpy.asarray(encoded["offset_mapping"], dtype=numpy.int64).reshape(-1, 2)
    points = numpy.frombuffer(text.encode("utf-32-le"), dtype=numpy.uint32)
    widths = 1 + (points >= 0x80).astype(numpy.int64) + (points >= 0x800) + (points >= 0x10000)
    byte_at = numpy.concatenate([numpy.zeros(1, dtype=numpy.int64), numpy.cumsum(widths)])
    ends = byte_at[numpy.maximum.accumulate(offsets[:, 1])] if len(ids) else numpy.zeros(0, dtype=numpy.int64)
    starts = numpy.concatenate([numpy.zeros(min(1, len(ids)), dtype=numpy.int64), ends[:-1]])
    carries = numpy.zeros(len(text) + 1, dtype=bool)
    position = 0
    for document in documents.documents:
        for start, end in document.spans if document.spans is not None else ((0, len(document.text)),):
            carries[position + start : position + end] = True
        position += len(document.text) + len(documents.join)
    loss = carries[offsets[:, 0]] & (offsets[:, 1] > offsets[:, 0])
    if bos == "start":
        ids, loss = numpy.insert(ids, 0, tokenizer.bos_token_id), numpy.insert(loss, 0, False)
        starts, ends = numpy.insert(starts, 0, 0), numpy.insert(ends, 0, 0)
    return ids, starts, ends, loss


def _choose(documents: Documents, tokens: int, seq_len: int, body: int, windows: int | None, seed: int | None) -> numpy.ndarray:
    """Which of the text's windows, `body` tokens of it each, are taken; in text order."""
    where, available = f"{documents.protocol['dataset']} ({documents.protocol['part']})", tokens // body
    if available == 0:
        raise InputError(
            f"{where}: {tokens} tokens are fewer than one window of {seq_len}; "
            f"give a longer text or set seq_len to at most {tokens + seq_len - body}"
        )
    if windows is not None and windows > available:
        log.warning("%s: all %d windows are used, %d were requested", where, available, windows)
    count = available if windows is None else min(windows, available)
    if seed is None:
        return numpy.arange(count)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values.numpy()


def _order(count: int, seed: int, epoch: int) -> Tensor:
    """The shuffled windows of one epoch."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "big") >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


def _fingerprint(documents: Iterable[Document], join: str) -> str:
    """sha256 of the texts, their borders, spans and join."""
    digest = hashlib.sha256(json.dumps(join).encode())
    for document in documents:
        digest.update(json.dumps([document.text, document.spans]).encode())
    return digest.hexdigest()
