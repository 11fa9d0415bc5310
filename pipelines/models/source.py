"""Resolves what the user named to a local model directory, and reads its config, tokenizer and safetensors files. Knows transformers' loaders; no structure of a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..demo import imported
from ..errors import UNWRITABLE, InputError, UsageError, as_input_error
from ..formats.shards import open_directory, weight_files
from ..recipes.recipe import Recipe
from ..store.files import cached_sha256
from .gguf_codes import import_gguf

LARGEST = {
    "_layers": 10_000,
    "_layer": 10_000,
    "_experts": 10_000,
    "_heads": 2**20,
    "_head": 2**20,
    "_dim": 2**24,
    "_size": 2**24,
    "_embd": 2**24,
}
"""What sizes in a config may be at most, by the ends of their names: a skeleton of more takes all time and memory before it fails."""
DEEP = 512
"""Blocks that a skeleton of is made in about a second; a config that says more is compared with its weights first."""


def source_of(recipe: Recipe) -> Path:
    """The directory of a recipe's model. A `.gguf` file keeps its codes where no stage makes others of its matrices."""
    return resolve_model(recipe.model, recipe.revision, not any(spec.name in ("prune", "quantize", "decompose") for spec in recipe.stages))


def resolve_model(model: str, revision: str | None = None, codes: bool = False) -> Path:
    """The local Hugging Face directory behind `demo`, a directory, a `.gguf` file (dense, or with `codes` as it is quantized) or a Hub id.
    InputError says which it was not; UsageError for a revision of what has none."""
    refuse_revision(model, revision)
    if model == "demo":
        return imported.demo_model()
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{model}: no such file; give a .gguf file, a model directory, a Hub id or 'demo'")
        return import_gguf(path) if codes else imported.import_gguf(path)
    if path.is_dir():
        if not (weights_home(path) / "config.json").is_file():
            raise InputError(f"{model}: no config.json, so this is not a Hugging Face model directory")
        return path.resolve()
    if path.is_file() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(
            f"{model}: no such model directory; give a directory with config.json, a .gguf file, a Hub id (owner/name) or 'demo'"
        )
    return _from_hub(model, revision)


def refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None and (model == "demo" or Path(model).expanduser().exists()):
        raise UsageError(f"--revision {revision}: {model} is no model of the Hub and has no revisions; leave it out")


def weights_home(directory: Path) -> Path:
    """Where a model directory keeps config and weights: itself, or `base` where an export made `base` and `adapter`."""
    return directory / "base" if (directory / "base").is_dir() and (directory / "adapter").is_dir() else directory


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise InputError(f"{model}: the Hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{model}: neither a local directory nor a model on the Hub (or it is private: log in with `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise InputError(
                f"{model}: {error.filename or 'the cache of the Hub'} cannot be written ({error.strerror}); set HF_HOME to a directory of yours"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"{model}: no such directory, and as a model of the Hub not in the local cache, nor can the Hub be reached{offline}; "
            "give a local directory or 'demo'"
        ) from error


def load_config(directory: Path) -> PretrainedConfig:
    with as_input_error(f"{directory}: transformers cannot read config.json"):
        config = AutoConfig.from_pretrained(weights_home(directory), trust_remote_code=False)
    for name, value in config.to_dict().items():
        limit = next((most for ending, most in LARGEST.items() if name.endswith(ending)), None)
        if limit is not None and isinstance(value, int) and value > limit:
            raise InputError(f"{directory}: config.json says {name} {value}, and no model has more than {limit}; fetch the file again")
        if name.endswith(("_layers", "_layer")) and isinstance(value, int) and value > DEEP:
            imported.refuse_more_blocks(f"{directory}: config.json: {name}", value, open_directory(weights_home(directory)))
    return config


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens the model was made for; None where its config does not say."""
    result = getattr(config.get_text_config(), "max_position_embeddings", None)
    return result if isinstance(result, int) and result > 0 else None


def refuse_beyond(config: PretrainedConfig, lengths: Mapping[str, int]) -> None:
    """UsageError for the first of `lengths` (option → tokens) that is above the positions that the model was made for: an index error, or
    numbers without meaning."""
    limit = positions(config)
    for option, tokens in lengths.items():
        if limit is not None and tokens > limit:
            raise UsageError(f"{option}: {tokens} tokens are above the {limit} positions of this model; ask for at most {limit}")


def refuse_unknown_tokens(config: PretrainedConfig, ids: Tensor, text: str) -> None:
    """InputError where a text has tokens that the model has no embedding for: the tokenizer is another model's."""
    rows, most = config.get_text_config().vocab_size, int(ids.max()) if ids.numel() else 0
    if most >= rows:
        raise InputError(
            f"{text}: the tokenizer makes token {most}, and the model has embeddings for {rows} tokens; the tokenizer belongs to another model"
        )


def load_tokenizer(directory: Path) -> Any:
    with as_input_error(f"{directory}: no tokenizer that transformers can read", "put tokenizer.json next to config.json"):
        tokenizer = AutoTokenizer.from_pretrained(weights_home(directory), trust_remote_code=False)
        tokenizer("a")  # what its settings say wrongly shows at the first text
        return tokenizer


def source_files(directory: Path) -> dict[str, dict[str, object]]:
    """safetensors files of a model directory with size and sha256 (cached by path, size and time of change)."""
    paths = source_paths(directory)
    return {name: {"sha256": cached_sha256(path), "bytes": path.stat().st_size} for name, path in paths.items()}


def source_paths(directory: Path) -> dict[str, Path]:
    """Name → safetensors file of a model directory. InputError when there is none, or one is missing."""
    if weights_home(directory) != directory:
        return {f"{part}/{name}": path for part in ("base", "adapter") for name, path in source_paths(directory / part).items()}
    return {file.name: file for file in weight_files(directory)}
