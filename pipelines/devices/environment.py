"""A run's environment: device, threads and versions, as written to environment.json.

Knows torch's settings and the process; no recipe, no stage.
"""

import logging
import os
import platform

import torch

from ..errors import InputError
from ..ranks.exchange import ONE, Ranks
from ..store.files import read_json, write_json
from ..store.rundir import RunDirectory
from .compute import Compute, chosen_device, chosen_dtype

log = logging.getLogger("bitmend")


def compute_of(place: RunDirectory | None, device: str, dtype: str = "auto", deterministic: bool = True, ranks: Ranks = ONE) -> Compute:
    """Where and how a run computes: as set, `auto` being what environment.json says it began with. A run that began on a GPU
    and is continued where there is none goes on on the CPU. UsageError for a device or a dtype that is not there."""
    path = None if place is None else place.path / "environment.json"
    result = read_json(path, "delete it and resume") if ranks.leads and path is not None and path.is_file() else {}
    result = ranks.broadcast(result)
    before = str(result.get("device", "auto"))
    if ranks.size > 1 and before.startswith("cuda"):
        before = "cuda"  # of each rank its own
    if device == "auto" and not (before.startswith("cuda") and not torch.cuda.is_available()):
        device = before
    chosen = chosen_device(device, ranks)
    if dtype == "auto" and before != "auto" and torch.device(before).type == chosen.type:
        dtype = result["dtype"]
    if ranks.size > 1:  # what a measurement chooses is one rank's choice
        dtype = ranks.broadcast(str(chosen_dtype(dtype, chosen)).removeprefix("torch.") if ranks.leads else None)
    return Compute(chosen, chosen_dtype(dtype, chosen), deterministic)


def write_environment(place: RunDirectory, compute: Compute, ranks: Ranks = ONE) -> None:
    """environment.json: written at the first start; a later one continues with its threads, on every rank."""
    torch.set_num_threads(ranks.broadcast(_written(place, compute) if ranks.leads else None))


def _written(place: RunDirectory, compute: Compute) -> int:
    """How many threads the run began with."""
    import transformers

    path = place.path / "environment.json"
    result = {
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "platform": platform.platform(), "cores": os.cpu_count(),
    }  # fmt: skip
    result = read_json(path, "delete it and resume") if path.is_file() else result
    if not isinstance(result.get("threads"), int):
        raise InputError(f"{path}: does not say how many threads the run began with; delete it and resume")
    where = {"device": str(compute.device), "dtype": compute.dtype_name, "deterministic": compute.deterministic}
    if compute.device.type == "cuda":
        where["device_name"] = torch.cuda.get_device_name(compute.device)
    if result | where != result:
        write_json(path, {**where, **{key: value for key, value in result.items() if key not in (*where, "device_name")}})
    return result["threads"]
