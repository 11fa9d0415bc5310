"""Self-generated calibration text: sampled once from the dense model at temperature 1, kept in the program's cache under the model's name.

Half of the documents begin at BOS alone, half with one more token drawn from the whole vocabulary, so that rare kinds come up. Knows
checkpoints of transformers; not what the text is used for.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.cache import cache_directory
from ..demo.download import locked
from ..errors import InputError
from ..formats import detect
from ..logs import bar
from ..models.source import weights_home
from ..store.files import write_bytes
from ..text.sources import PARAGRAPH, Body
from ..text.splits import Document
from .baseline import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("bitmend")
VERSION = 1
DOCUMENTS, TOKENS, AT_ONCE = 128, 128, 64
"""How many documents of how many tokens, and how many are written at once."""


def self_text(model: Path, tokenizer: "PreTrainedTokenizerBase", seed: int, device: torch.device) -> Body:
    """What the model in this directory writes. InputError for a quantized one, and for a kept text that another model wrote."""
    path, facts = _place(model, tokenizer, seed)
    begin, where = _beginning(tokenizer)
    with locked(path):
        if not path.is_file():
            log.info("self: %s writes %d documents of %d tokens; each begins %s", model.name, DOCUMENTS, TOKENS, where)
            rows = [facts, *({"text": text} for text in _written(model, tokenizer, begin, seed, device))]
            write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    documents = [Document(text) for text in _kept(path, facts)]
    return Body(documents, PARAGRAPH, f"self (written by {facts['model'][:8]}, {where})", "by document")


def is_written(model: Path, tokenizer: "PreTrainedTokenizerBase", seed: int) -> bool:
    """Whether that text is in the cache."""
    return _place(model, tokenizer, seed)[0].is_file()


def _place(model: Path, tokenizer: "PreTrainedTokenizerBase", seed: int) -> tuple[Path, dict[str, Any]]:
    """Where the text lies, and the facts that name it."""
    settings = {"version": VERSION, "documents": DOCUMENTS, "tokens": TOKENS, "seed": seed, "begins": _beginning(tokenizer)[1]}
    facts = {"model": fingerprint(model), "settings": settings}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "text" / f"self-{name}.jsonl", facts


def _kept(path: Path, facts: Mapping[str, object]) -> list[str]:
    try:
        written_by, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        texts = [row["text"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a text that this program kept ({error}); delete it and run again") from error
    if written_by != facts:
        raise InputError(f"{path}: another model or other settings wrote it ({written_by}); delete it and run again")
    return texts


def _beginning(tokenizer: Any) -> tuple[int | None, str]:
    """The token before the first one, and that in words."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id, "at BOS"
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id, "at EOS, since the tokenizer has no BOS"
    return None, "with a token drawn from the vocabulary, since the tokenizer has neither BOS nor EOS"


@torch.no_grad()
def _written(model: Path, tokenizer: Any, begin: int | None, seed: int, device: torch.device) -> list[str]:
    from transformers import AutoModelForCausalLM

    if weights_home(model) != model or detect(model) != "dense":
        raise InputError(f"{model}: is quantized, and 'self' is what a dense model writes; give it with --teacher, or leave 'self' out")
    try:
        writer: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{model}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    writer.to(device).eval()
    drawn = torch.randint(len(tokenizer), (DOCUMENTS,), generator=torch.Generator().manual_seed(seed))
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), bar("self, documents", DOCUMENTS) as shown:
        torch.manual_seed(seed)
        for start in range(0, DOCUMENTS, AT_ONCE):
            # the first half of them begins at BOS alone
            random_N = drawn[start : start + AT_ONCE] if start >= DOCUMENTS // 2 or begin is None else None
            ids_NT = _sampled(writer, _prefix(begin, random_N), device)
            texts += tokenizer.batch_decode(ids_NT[:, 0 if begin is None else 1 :].tolist(), clean_up_tokenization_spaces=False)
            shown.advance(AT_ONCE)
    return texts


def _prefix(begin: int | None, random_N: Tensor | None) -> Tensor:
    """ids [AT_ONCE, 1 or 2]"""
    first = [] if begin is None else [torch.full((AT_ONCE, 1), begin)]
    return torch.cat([*first, *([] if random_N is None else [random_N.unsqueeze(1)])], dim=1)


def _sampled(writer: Any, prefix_NT: Tensor, device: torch.device) -> Tensor:
    """ids [N, TOKENS]; an end token ends nothing, what follows it is the next text."""
    ids_NT = prefix_NT.to(device)
    result = writer.generate(
        input_ids=ids_NT, attention_mask=torch.ones_like(ids_NT), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        eos_token_id=None, pad_token_id=0, min_new_tokens=TOKENS - ids_NT.shape[1], max_new_tokens=TOKENS - ids_NT.shape[1], cache_implementation="static", disable_compile=True,
    )  # fmt: skip
    return result.cpu()
