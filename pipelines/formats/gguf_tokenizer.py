"""A tokenizer as llama.cpp's converter writes it: byte-level BPE, SentencePiece's BPE, and Unigram; special tokens and the chat template.

llama.cpp has its own tokenizers and knows the split of a text before BPE by name. So the name is looked up by what tokenizer.json does, and what
has no name is refused: the same text would become other tokens. Knows files of a Hugging Face tokenizer; no model.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypeAlias, TypedDict

from gguf import GGUFWriter, TokenType

from ...reports.json_values import mapping, mappings, text
from ..errors import UsageError, as_input_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHERWISE = "--format dense keeps the tokenizer's own files"
GPT2 = "byte level"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "dbrx",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((_CASED % ("", "") + r"\p{N}" + _CASED_REST,), True): "tekken",
    ((_CASED % (_SHORT, _SHORT) + r"\p{N}{1,3}" + _CASED_REST,), False): "gpt-4o",
}
"""(regular expressions that split a text, whether a whole word that is a token is taken without merging) → llama.cpp's name."""
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


class AddedToken(TypedDict):
    """Of a tokenizer.json's `added_tokens`."""

    id: int
    content: str
    special: bool


Step: TypeAlias = Mapping[str, object]
"""Of a normalizer or a pre-tokenizer in tokenizer.json: `type` says which other settings it has."""


class Pieces(TypedDict, total=False):
    """tokenizer.json's `model`, of BPE."""

    unk_token: str | None
    byte_fallback: bool


class UnigramPieces(TypedDict, total=False):
    """tokenizer.json's `model`, of Unigram: pieces and their scores."""

    vocab: Required[list[tuple[str, float]]]
    unk_id: int | None
    byte_fallback: bool


class Described(TypedDict):
    """What is read of tokenizer.json."""

    normalizer: Step | None
    pre_tokenizer: Step | None


class Common(TypedDict):
    """The fields of a Vocabulary that all kinds are given alike."""

    special: dict[str, int]
    add: dict[str, bool]
    template: str | None


@dataclass(frozen=True)
class Vocabulary:
    """What is written: `kind` is llama.cpp's (gpt2, llama, t5); special: bos, eos, … → id; add: which of them frame a text."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    space_prefix: bool | None = None
    charsmap: bytes | None = None
    template: str | None = None
    notes: tuple[str, ...] = ()

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, value in self.add.items():
            getattr(writer, f"add_add_{name}_token")(value)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.charsmap is not None:
            writer.add_precompiled_charsmap(self.charsmap)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(directory: Path | None, rows: int) -> Vocabulary:
    """The tokenizer of a model whose embeddings have so many rows; ids without a token are padded as unused.

    UsageError for a tokenizer that llama.cpp has no name or kind for, InputError where none can be read.
    """
    from transformers import AutoTokenizer

    if directory is None or not (directory / "tokenizer.json").is_file():
        raise UsageError(
            f"{directory}: no tokenizer.json, and a GGUF file holds its tokenizer; put tokenizer.json and tokenizer_config.json next to config.json"
        )
    with as_input_error(f"{directory}: no tokenizer that transformers can read", "put tokenizer.json next to config.json"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        described = loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise UsageError(f"{directory}: a tokenizer of kind {model['type']}; llama.cpp has BPE and Unigram for these families. {OTHERWISE}")
    pieces = dict(model["vocab"]) if model["type"] == "BPE" else {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    added = {token["id"]: token for token in described.get("added_tokens") or []}
    most = max([*pieces.values(), *added], default=-1)
    if most >= rows:
        raise UsageError(
            f"{directory}: its tokenizer makes token {most}, the model has embeddings for {rows} tokens; they belong to different models"
        )
    special = {
        name: i for name in ("bos", "eos", "unk", "sep", "pad", "mask") if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    common: Common = {"special": special, "add": _frames(tokenizer, special), "template": getattr(tokenizer, "chat_template", None)}
    tokens, types = _padded(pieces, added, rows)
    if model["type"] == "Unigram":
        return _unigram(described, model, tokens, types, common)
    pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _sentencepiece(described, model, pieces, pairs, tokens, types, common)
    splits = _splits(described["pre_tokenizer"])
    pre = PRE_TOKENIZERS.get((splits or (), bool(model.get("ignore_merges"))))
    if pre is None:
        raise UsageError(
            f"{directory}: llama.cpp has no name here for how its tokenizer splits a text before BPE ({splits or described['pre_tokenizer']}); "
            f"the names known are {', '.join(PRE_TOKENIZERS.values())}. {OTHERWISE}"
        )
    merges = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, **common)


def _padded(pieces: Mapping[str, int], added: Mapping[int, AddedToken], rows: int) -> tuple[list[str], list[TokenType]]:
    """(text, type) of every row of the embeddings."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    for piece, i in pieces.items():
        tokens[i], types[i] = piece, TokenType.NORMAL
    for i, token in added.items():
        control = token["special"] or _looks_special(token["content"])
        tokens[i] = token["content"] if control else token["content"].replace("▁", " ")
        types[i] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """As the converter: some models do not mark what is never text."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in _LOOK_SPECIAL or any(text.startswith(first) and text.endswith(last) for first, last in ends)


def _frames(tokenizer: "PreTrainedTokenizerBase", special: Mapping[str, int]) -> dict[str, bool]:
    """Whether a text gets the first token in front and the last behind. UsageError for other frames."""
    bare, framed = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if framed == [special.get("bos", -1)] * bos + bare + [special.get("eos", -1)] * eos:
                return {"bos": bos, "eos": eos}
    raise UsageError(f"its tokenizer frames a text as {framed} around {bare}; llama.cpp adds bos and eos only. {OTHERWISE}")


def _flat(part: Step | None) -> Iterator[Step]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is not None and part["type"] == "Sequence":
        for step in mappings(part.get("normalizers") or part.get("pretokenizers") or []):
            yield from _flat(step)
    elif part is not None:
        yield part


def _splits(pre_tokenizer: Step | None) -> tuple[str, ...] | None:
    """The regular expressions that split a text, one after the other; None for a step that llama.cpp has none of."""
    out: list[str] = []
    for step in _flat(pre_tokenizer):
        pattern = mapping(step.get("pattern") or {})
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            out += [GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            out.append(r"\p{N}")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in pattern:
            out.append(text(pattern["Regex"]))
        else:
            return None
    return tuple(out)


def _space_prefix(described: Described) -> tuple[bool, tuple[str, ...]]:
    """(whether ▁ goes before a text, the notes on that). UsageError where spaces do not become ▁ at all."""
    result: set[object] = set()
    for step in [*_flat(described["normalizer"]), *_flat(described["pre_tokenizer"])]:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            result.add("prefix")
        elif step["type"] == "Metaspace" and step["replacement"] == "▁":
            result |= {"spaces"} if step["prepend_scheme"] == "never" else {"spaces", "prefix", "not twice"}
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            result.add("spaces")
        elif step["type"] not in ("Precompiled", "Split") and not (
            step["type"] == "Replace" and mapping(step["pattern"]).get("Regex") == " {2,}"
        ):
            raise UsageError(f"llama.cpp has no step {step['type']} in a SentencePiece tokenizer. {OTHERWISE}")
    if "spaces" not in result:
        raise UsageError(f"its tokenizer does not write spaces as ▁, as SentencePiece does. {OTHERWISE}")
    twice = "llama.cpp puts ▁ before a text that begins with a space, too, and this tokenizer does not: such a text, or one behind a special token, gets a token more there"
    return "prefix" in result, (twice,) if "not twice" in result else ()


def _bytes_and_unknown(tokens: list[str], types: list[TokenType], unknown: str | None) -> None:
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = TokenType.UNKNOWN
        elif types[i] == TokenType.NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = TokenType.BYTE


def _sentencepiece(
    described: Described,
    model: Pieces,
    pieces: Mapping[str, int],
    pairs: Sequence[tuple[str, ...]],
    tokens: list[str],
    types: list[TokenType],
    common: Common,
) -> Vocabulary:
    """llama.cpp merges whatever two pieces give the piece of the highest score. The scores are the order in which the merges make the pieces."""
    _bytes_and_unknown(tokens, types, model.get("unk_token"))
    scores = [0.0 if kind == TokenType.NORMAL else -1000.0 for kind in types]
    made = [piece for piece, _ in groupby(left + right for left, right in pairs)]
    if len(set(made)) != len(made):
        twice = next(piece for number, piece in enumerate(made) if piece in made[:number])
        raise UsageError(f"its tokenizer merges {twice!r} at two ranks, and a SentencePiece tokenizer has one score for it. {OTHERWISE}")
    for rank, piece in enumerate(made):
        scores[pieces[piece]] = -float(rank)
    known, possible = set(map(tuple, pairs)), 0
    for piece in made:
        possible += sum((piece[:i], piece[i:]) not in known and piece[:i] in pieces and piece[i:] in pieces for i in range(1, len(piece)))
    prefix, remarks = _space_prefix(described)
    if possible:
        remarks += (f"llama.cpp also merges {possible} pairs of pieces that this tokenizer does not: a text may become other tokens there",)
    return Vocabulary("llama", "default", tokens, types, scores, space_prefix=prefix, notes=remarks, **common)


def _unigram(described: Described, model: UnigramPieces, tokens: list[str], types: list[TokenType], common: Common) -> Vocabulary:
    if model.get("byte_fallback"):
        raise UsageError(f"its tokenizer is Unigram with bytes for unknown letters, and llama.cpp's Unigram has none. {OTHERWISE}")
    unknown_id = model.get("unk_id")
    unknown = None if unknown_id is None else model["vocab"][unknown_id][0]
    _bytes_and_unknown(tokens, types, unknown)
    scores = [float(score) for _, score in model["vocab"]] + [-10000.0] * (len(tokens) - len(model["vocab"]))
    charsmap = next((text(step["precompiled_charsmap"]) for step in _flat(described["normalizer"]) if step["type"] == "Precompiled"), None)
    decoded = None if charsmap is None else base64.b64decode(charsmap)
    prefix, remarks = _space_prefix(described)
    return Vocabulary("t5", "default", tokens, types, scores, space_prefix=prefix, charsmap=decoded, notes=remarks, **common)
