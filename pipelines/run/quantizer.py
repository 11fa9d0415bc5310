"""The transformers quantizer for a stage's directory: `AutoModelForCausalLM.from_pretrained(DIR)` gives the model that `load(DIR, dtype=…)` gives, and its
`save_pretrained` writes a directory that both load again.

transformers reads tensors by the names of its own modules, and an artifact's belong to records; so the model it has made is emptied before it
reads, and gets the modules of ours when it has. Imported while transformers is being imported: what needs torch comes in with the first model.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError, UsageError
from ..store.files import write_json
from ..store.manifest import MANIFEST, QUANT_METHOD, SCHEMA

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from ..store.artifact import Artifact

NEEDED = "5.17"
"""The oldest transformers that this was tried with."""
EVERY_NAME = {""}
Device: TypeAlias = "int | str | torch.device"
DeviceMap: TypeAlias = "str | Mapping[str, Device] | None"


def register(registry: ModuleType) -> None:
    """Make the quantizer known to `registry`, the module `transformers.quantizers.auto`; one warning where it takes none."""
    if not hasattr(registry, "register_quantizer") or not hasattr(registry, "register_quantization_config"):
        warnings.warn(
            f"this transformers takes no quantizers of others, so a stage's directory does not load in it; pip install 'transformers>={NEEDED}'",
            stacklevel=2,
        )
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class ArtifactConfig(QuantizationConfigMixin):
        """What an artifact's config.json says of itself: that it is one."""

        def __init__(self, quant_method: str = QUANT_METHOD) -> None:
            self.quant_method: Any = quant_method

    class ArtifactQuantizer(HfQuantizer):
        """Knows the steps of `from_pretrained`; models are made by `opening`."""

        def update_device_map(self, device_map: DeviceMap) -> dict[str, Device] | None:
            return one_device(device_map)

        def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
            refuse_hub_id(config)
            return super().update_attn_implementation(config)

        def _process_model_before_weight_loading(
            self,
            model: "PreTrainedModel",
            *,
            checkpoint_files: list[str],
            device_map: DeviceMap = None,
            use_kernels: bool = False,
            **others: object,
        ) -> "PreTrainedModel":
            self.made = _begin(model, checkpoint_files, one_device(device_map), use_kernels)
            return model

        def _process_model_after_weight_loading(self, model: "PreTrainedModel", **others: object) -> "PreTrainedModel":
            artifact, device, dtype = self.made
            _fill(model, artifact, device, dtype)
            return model

        def is_serializable(self) -> Any:
            return True

        @property
        def is_trainable(self) -> Any:
            return False

    registry.register_quantization_config(QUANT_METHOD)(ArtifactConfig)
    registry.register_quantizer(QUANT_METHOD)(ArtifactQuantizer)


def refuse_hub_id(config: object) -> None:
    """UsageError where the model was named by an id of the Hub: transformers would ask there for the file that no artifact has."""
    name = getattr(config, "_name_or_path", "")
    if name and not Path(name).is_dir():
        raise UsageError(
            f"{name}: an artifact loads from a directory; fetch it first, as in from_pretrained(huggingface_hub.snapshot_download({name!r}))"
        )


def one_device(device_map: DeviceMap) -> dict[str, Device] | None:
    """A `device_map` that names one device, whatever it was given as; UsageError for several."""
    if isinstance(device_map, str):
        from ..devices.compute import chosen_device

        return {"": chosen_device("auto")}
    if device_map is not None and len(set(device_map.values())) > 1:
        raise UsageError(f"device_map {device_map}: an artifact's kernels are bound to one device; name one, as in device_map='cuda'")
    return None if device_map is None else dict(device_map)


def _begin(
    model: "PreTrainedModel", files: list[str], device_map: Mapping[str, Device] | None, use_kernels: bool
) -> "tuple[Artifact, torch.device, torch.dtype]":
    """The artifact, its files checked, and where its model is to run. Empties `model` and makes transformers read one small file of it, no
    tensor of which has a place there. UsageError for what cannot be had of a bound model."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from ..store.artifact import open_artifact

    artifact = open_artifact(Path(files[0]).resolve().parent)
    artifact.verify()
    if type(model) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None):
        raise UsageError(
            f"{artifact.directory}: holds a causal language model; AutoModelForCausalLM loads it, {type(model).__name__} does not"
        )
    if getattr(model.config, "distributed_config", None) is not None:
        raise UsageError("an artifact's kernels are bound to one device; leave tp_plan and distributed_config out")
    if use_kernels:
        raise UsageError("an artifact runs on kernels of its own; leave use_kernels out")
    sizes = {entry["bytes"]: name for name, entry in artifact.manifest["files"].items() if name.endswith(".safetensors")}
    files[:] = [str(artifact.weights / sizes[min(sizes)])]
    model._modules.clear()
    model.all_tied_weights_keys = {}
    model._keys_to_ignore_on_load_unexpected = EVERY_NAME
    place, dtype = next(iter((device_map or {"": "cpu"}).values())), model.config.dtype
    assert isinstance(dtype, torch.dtype)  # transformers has settled it by now
    return artifact, torch.device(place), dtype


def _fill(model: "PreTrainedModel", artifact: "Artifact", device: "torch.device", dtype: "torch.dtype") -> None:
    """Give `model` the modules of the artifact's, and a `save_pretrained` that writes what they were made of."""
    from .opening import bound_model

    quantization = model.config.quantization_config
    ours = bound_model(artifact, device, dtype, model.config)
    for name in ("_modules", "config", "all_tied_weights_keys", "_tied_weights_keys", "_keys_to_ignore_on_load_unexpected"):
        setattr(model, name, getattr(ours, name))
    model.config.quantization_config = quantization
    plain = model.save_pretrained
    vars(model)["save_pretrained"] = partial(_save, model, artifact, plain)
    if "get_memory_footprint" in vars(ours):
        from ...kernels.linear import resident_bytes

        model.get_memory_footprint = lambda return_buffers=True: resident_bytes(model)


def _save(
    model: "PreTrainedModel",
    artifact: "Artifact",
    plain: Callable[..., None],
    save_directory: str | Path,
    is_main_process: bool = True,
    **options: object,
) -> None:
    """The artifact, copied: what every parameter of the model still is. An adapter that PEFT has put on the model is saved as transformers
    saves it. UsageError for settings that belong to other ways of saving, InputError where parameters have changed."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return plain(save_directory, is_main_process=is_main_process, **options)
    refused = sorted(name for name, value in options.items() if value and name != "safe_serialization")
    if refused:
        raise UsageError(f"save_pretrained: {', '.join(refused)}: an artifact is copied as it is; leave that out")
    changed = [name for name, value in model.named_parameters() if _differs(artifact, name, value)]
    if changed:
        raise InputError(
            f"{changed[0]} is not what {artifact.directory} holds ({len(changed)} parameters have changed), and codes stay as they are; "
            "train with `pipeline run recover`, or save what has changed by itself"
        )
    if is_main_process:
        _copy(artifact, Path(save_directory), model.generation_config)
    return None


def _differs(artifact: "Artifact", name: str, value: "torch.Tensor") -> bool:
    """Whether a parameter that the artifact stores plainly has another value, rounded as the model's is."""
    if name not in artifact.index or not artifact.is_plain(name):
        return False
    stored = artifact.tensor(name).to(value.device, value.dtype)
    return stored.shape != value.shape or not bool((stored == value).all())


def _copy(artifact: "Artifact", directory: Path, generation_config: "GenerationConfig | None") -> None:
    """Shards, config and manifest, under checksums as before; the tokenizer's files without, since `tokenizer.save_pretrained`
    writes its own over them."""
    from ..formats.shards import fresh_directory

    with fresh_directory(directory) as scratch:
        kept = {name: entry for name, entry in artifact.manifest["files"].items() if name.endswith(".safetensors") or name == "config.json"}
        for name in artifact.manifest["files"]:
            shutil.copyfile((artifact.weights if name.endswith(".safetensors") else artifact.directory) / name, scratch / name)
        if generation_config is not None:
            generation_config.save_pretrained(scratch)
        manifest = {name: value for name, value in artifact.manifest.items() if name != "source"}
        write_json(scratch / MANIFEST, {**manifest, "schema": SCHEMA, "files": kept})
