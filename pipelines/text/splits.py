"""Splits documents into parts, and removes what would leak from one part into another.

Knows texts and hashes. Does not know files, data sets or tokenizers. The same documents always split the same way, wherever
they come from and in whatever order.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PARTS = ("evaluation", "held_out", "calibration", "train")
SHARES = {"evaluation": 0.12, "held_out": 0.04, "calibration": 0.26, "train": 0.58}
FEWEST_DOCUMENTS = 8
SHARED_LINE_CHARACTERS = 100


@dataclass(frozen=True)
class Document:
    """A text and the half-open character ranges that carry loss; `spans` None means all of it."""

    text: str
    spans: tuple[tuple[int, int], ...] | None = None


def normalised_hash(text: str) -> str:
    """sha256 of a text without regard to case, white space and compatibility forms: equal for what a reader calls the same text."""
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()).hexdigest()


def split_documents(documents: Sequence[Document], roles: Iterable[str]) -> tuple[dict[str, list[Document]], str]:
    """Split among the `roles` (a subset of PARTS) in the ratio of SHARES, and a word on how.

    Documents are taken in the order of their normalised hash, so equal ones stay in one part, and filled by characters. Where there are
    too few for that, or one is most of the text, the text is cut into contiguous regions instead (never where spans carry loss).
    Raises ValueError where there are fewer documents than roles and they cannot be cut.
    """
    wanted = [part for part in PARTS if part in set(roles)]
    if len(wanted) == 1:
        return {wanted[0]: list(documents)}, "whole"
    total = sum(len(document.text) for document in documents)
    longest = max((len(document.text) for document in documents), default=0)
    with_spans = any(document.spans is not None for document in documents)
    if not with_spans and (len(documents) < FEWEST_DOCUMENTS or 2 * longest > total):
        return _contiguous(documents, wanted), "contiguous regions"
    return _by_hash(documents, wanted), "documents by hash"


def _by_hash(documents: Sequence[Document], roles: list[str]) -> dict[str, list[Document]]:
    copies: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        copies.setdefault(normalised_hash(document.text), []).append(index)
    if len(copies) < len(roles):
        raise ValueError(f"{len(copies)} distinct documents cannot be split into {len(roles)} parts ({', '.join(roles)})")
    total = sum(len(document.text) for document in documents)
    limits = _limits(roles, total)
    chosen: dict[str, list[int]] = {role: [] for role in roles}
    current, done = 0, 0
    for position, digest in enumerate(sorted(copies)):
        left = len(copies) - position
        full = done >= limits[current] or left <= len(roles) - 1 - current
        if full and chosen[roles[current]] and current < len(roles) - 1:
            current += 1
        chosen[roles[current]] += copies[digest]
        done += sum(len(documents[index].text) for index in copies[digest])
    return {role: [documents[index] for index in sorted(indices)] for role, indices in chosen.items()}


def _contiguous(documents: Sequence[Document], roles: list[str]) -> dict[str, list[Document]]:
    """Regions in the order train, calibration, held_out, evaluation, each ending at a line's end where one is near."""
    text = "\n\n".join(document.text for document in documents)
    order = list(reversed(roles))
    regions, start = {}, 0
    for role, limit in zip(order, _limits(order, len(text)), strict=True):
        end = len(text) if role == order[-1] else _line_end(text, max(start, round(limit)), len(text) // 50)
        regions[role] = [Document(text[start:end])] if end > start else []
        start = end
    return regions


def _limits(roles: list[str], total: int) -> list[float]:
    """Cumulative characters at which each role is full."""
    whole = sum(SHARES[role] for role in roles)
    limits, done = [], 0.0
    for role in roles:
        done += SHARES[role] / whole * total
        limits.append(done)
    return limits


def _line_end(text: str, near: int, reach: int) -> int:
    """End of the last line (else word) that ends within `reach` characters before `near`."""
    for mark in ("\n", " "):
        result = text.rfind(mark, max(0, near - reach), near)
        if result >= 0:
            return result + 1
    return near


@dataclass(frozen=True)
class Exclusion:
    """What the evaluation text contains: hashes of its documents and of its long lines."""

    documents: frozenset[str]
    lines: frozenset[str]

    @staticmethod
    def of(documents: Iterable[Document]) -> "Exclusion":
        texts = [document.text for document in documents]
        return Exclusion(
            frozenset(normalised_hash(text) for text in texts if text.strip()),
            frozenset(normalised_hash(line) for text in texts for line in text.split("\n") if len(line) >= SHARED_LINE_CHARACTERS),
        )

    def union(self, other: "Exclusion") -> "Exclusion":
        return Exclusion(self.documents | other.documents, self.lines | other.lines)

    def applied(self, documents: Sequence[Document]) -> tuple[list[Document], int, int]:
        """The documents without what is excluded, the number of documents dropped, the number of lines cut out of the others.

        A document goes when it equals an excluded one, when more than half of it is excluded lines, or when it has loss spans and
        any excluded line; of the others only those lines go. Lines under 100 characters are too common to count.
        """
        kept, dropped, cut = [], 0, 0
        for document in documents:
            remaining, lines = self._without(document)
            if remaining is None:
                dropped += 1
            else:
                kept.append(remaining)
                cut += lines
        return kept, dropped, cut

    def _without(self, document: Document) -> tuple[Document | None, int]:
        if normalised_hash(document.text) in self.documents:
            return None, 0
        lines = document.text.split("\n")
        result = [len(line) >= SHARED_LINE_CHARACTERS and normalised_hash(line) in self.lines for line in lines]
        if not any(result):
            return document, 0
        shared = sum(len(line) for line, hit in zip(lines, result, strict=True) if hit)
        if document.spans is not None or 2 * shared > len(document.text):
            return None, 0
        return Document("\n".join(line for line, hit in zip(lines, result, strict=True) if not hit)), sum(result)
