"""From what the user named to a local model directory, and what lies in it: config, tokenizer, safetensors files. Knows transformers' loaders; no structure of a model."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..demo import imported
from ..errors import InputError, UsageError
from ..store.files import cached_sha256


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local Hugging Face directory behind `demo`, a directory, a `.gguf` file or a Hub id. InputError says which it was not; UsageError
    for a revision of what has none."""
    refuse_revision(model, revision)
    if model == "demo":
        return imported.demo_model()
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{model}: no such file; give a .gguf file, a model directory, a Hub id or 'demo'")
        return imported.import_gguf(path)
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
    """Where a model directory keeps config and weights: itself, or `base` where an export put an `adapter` beside it."""
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
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"{model}: not in the local cache and the Hub cannot be reached{offline}; give a local directory or 'demo'"
        ) from error


def load_config(directory: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(weights_home(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{directory}: transformers cannot read config.json: {first}") from error


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens the model was made for; None where its config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(weights_home(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory}: no tokenizer that transformers can read ({str(error).splitlines()[0]}); put tokenizer.json beside config.json"
        ) from error


def source_files(directory: Path) -> dict[str, dict[str, Any]]:
    """safetensors files of a model directory with size and sha256 (cached by path, size and time of change)."""
    paths = source_paths(directory)
    return {name: {"sha256": cached_sha256(path), "bytes": path.stat().st_size} for name, path in paths.items()}


def source_paths(directory: Path) -> dict[str, Path]:
    """Name → safetensors file of a model directory. InputError when there is none, or one is missing."""
    if weights_home(directory) != directory:
        return {f"{part}/{name}": path for part in ("base", "adapter") for name, path in source_paths(directory / part).items()}
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(p.name for p in directory.glob("*.safetensors"))
    if not names:
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        also = f"; {pickles[0]} is a pickle file, which is never opened: convert it to safetensors" if pickles else ""
        raise InputError(f"{directory}: no .safetensors file{also}")
    missing = [n for n in names if not (directory / n).is_file()]
    if missing:
        raise InputError(f"{directory}: {index.name} names {missing[0]}, which is not there; download the model again")
    return {name: directory / name for name in names}
