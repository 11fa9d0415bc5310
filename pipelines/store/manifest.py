"""An artifact's manifest: what its directory holds, and whether that is still there as it was written.

Knows files and hashes, no tensors; imports nothing heavy, so that `status --verify` does not wait for torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import cached_sha256, read_json, sha256

SCHEMA = 1
MANIFEST = "artifact.json"
QUANT_METHOD = "bitmend"
FOR_TRANSFORMERS: Mapping[str, object] = {
    "quantization_config": {"quant_method": QUANT_METHOD},
    "transformers_weights": "import_bitmend_first.safetensors",
}
"""What an artifact's config.json says so that transformers asks our quantizer. There is no such file: where nobody has imported bitmend the
error names what is missing, instead of a model that is random where transformers does not know the tensors."""
FIELDS: Mapping[str, type] = {"key": str, "stage": dict, "files": dict, "linears": dict}


def read_manifest(directory: Path) -> dict[str, Any]:
    """InputError when it is missing, of another schema, or a file is missing or of another size."""
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory}: no {MANIFEST}, so this is no artifact; give a stage directory of a run")
    manifest = read_json(path, f"delete {directory} and run again")
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{path}: schema {manifest.get('schema')}, this program reads {SCHEMA}; run again into a new directory (-o)")
    if any(not isinstance(manifest.get(name), kind) for name, kind in FIELDS.items()):
        raise InputError(f"{path}: does not hold what a manifest does ({', '.join(FIELDS)}); delete {directory} and run again")
    for name, entry in manifest["files"].items():
        file = place_of(directory, manifest, name)
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            result = "is missing" if size is None else f"has {size} bytes"
            raise InputError(f"{file}: {result}, the manifest says {entry['bytes']}; delete {directory} and run again")
    return manifest


def verify_files(directory: Path, manifest: Mapping[str, Any], full: bool = False) -> None:
    """InputError names the first file whose sha256 is not the manifest's. A file that is as it was when it was last hashed (size, inode,
    times) is not read again, unless `full`."""
    for name, entry in manifest["files"].items():
        path = place_of(directory, manifest, name)
        result = sha256(path) if full else cached_sha256(path)
        if result != entry["sha256"]:
            raise InputError(
                f"{path}: sha256 is {result[:12]}…, the manifest says {entry['sha256'][:12]}…; delete {directory} and run again"
            )


def weights_of(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """Where the shards lie: the directory itself, or, for the baseline of a local model, the model's own."""
    source = manifest.get("source")
    return Path(source) if source else directory


def place_of(directory: Path, manifest: Mapping[str, object], name: str) -> Path:
    return (weights_of(directory, manifest) if name.endswith(".safetensors") else directory) / name
