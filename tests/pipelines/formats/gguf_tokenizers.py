"""Small tokenizers of every kind that a GGUF file can hold, trained on a text in a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitmend.pipelines.formats.gguf_tokenizer import GPT2, PRE_TOKENIZERS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROWS = 700
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
TEXTS = [
    "The quick brown fox doesn't jump over 1234567 lazy dogs.", "  two spaces\n\n\tand a tab, ΑΒΓ ÆØÅ naïve café", "I'VE seen it: x=3.14159; y != 2**10",
    "<|im_start|>user\nHello<s> there", "日本語 and emoji 🚀🦙 end ", "snake_case CamelCase ALLCAPS mixedCASE9", "a", " ",
]  # fmt: skip


def _byte_level(splits: tuple[str, ...], ignore_merges: bool, corpus: list[str]) -> Tokenizer:
    """BPE over bytes behind the splits of a row of PRE_TOKENIZERS."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in splits)]
    for regex in reversed([s for s in splits if s != GPT2]):
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True) if regex == r"\p{N}" else pre_tokenizers.Split(Regex(regex), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=ROWS - 20, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _sentencepiece(corpus: list[str], gemma: bool) -> Tokenizer:
    """As transformers writes SentencePiece's BPE: every split of a piece into two is a merge, unknown letters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=ROWS - 300, show_progress=False))
    bpe = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(["\n"] if gemma else []), *bpe["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made = dict.fromkeys(left + right for left, right in bpe["merges"])
    merges = [(p[:i], p[i:]) for p in made for i in range(1, len(p)) if p[:i] in vocabulary and p[i:] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([*([] if gemma else [normalizers.Prepend("▁")]), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    _framed(tokenizer)
    return tokenizer


def _unigram(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    letters = sorted(set("".join(corpus + TEXTS)) - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=ROWS - 10, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    _framed(tokenizer)
    return tokenizer


def _framed(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


GGUF_TOKENIZERS: dict[str, Callable[[list[str]], Tokenizer]] = {
    **{
        name: lambda corpus, splits=splits, whole=whole: _byte_level(splits, whole, corpus)
        for (splits, whole), name in PRE_TOKENIZERS.items()
    },
    "sentencepiece": lambda corpus: _sentencepiece(corpus, gemma=False),
    "gemma": lambda corpus: _sentencepiece(corpus, gemma=True),
    "unigram": _unigram,
}  # fmt: skip


def save_tokenizer(name: str, text: Path, directory: Path) -> PreTrainedTokenizerFast:
    """Train and save one; what was saved."""
    corpus = [json.loads(line)["text"][:3000] for line in text.read_text(encoding="utf-8").splitlines()[:12]]
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=GGUF_TOKENIZERS[name](corpus), chat_template="{{ messages }}", **own)
    tokenizer.save_pretrained(directory)
    return tokenizer
