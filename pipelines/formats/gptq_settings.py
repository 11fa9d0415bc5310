"""The settings a GPTQ checkpoint declares for its linears, and which linears differ. Knows the config, not the bytes."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ...compress.weights import GgmlWeight, NormalFloatWeight, UniformWeight
from ..errors import UsageError
from .checkpoint import Checkpoint, refuse_other_grid

CHECKPOINT_FORMATS = {1: "gptq", 2: "gptq_v2"}
Scheme = tuple[int, int]  # bits, group size


def schemes(base: UniformWeight) -> list[Scheme]:
    """Equivalent settings of a linear: one group over the whole row may be given by its size or as -1."""
    if base.groups == 1:
        return [(base.bits, -1), (base.bits, base.in_features)]
    return [(base.bits, base.group_size)]


@dataclass(frozen=True)
class Settings:
    """What `quantization_config` says: the commonest bits and group size, and each linear that differs (`dynamic`)."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    lm_head: bool
    dynamic: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Settings":
        """UsageError for linears on a NormalFloat grid or one of ggml's, and when there is nothing to hold."""
        of_linear: dict[str, list[Scheme]] = {}
        symmetric, act_order = True, False
        for name, record in checkpoint.linears.items():
            base = record.base
            of_linear[name] = []
            if isinstance(base, NormalFloatWeight | GgmlWeight):
                refuse_other_grid(name, base, "GPTQ")
            if isinstance(base, UniformWeight):
                of_linear[name] = schemes(base)
                symmetric, act_order = symmetric and base.symmetric, act_order or base.group_index is not None
        counts = Counter(scheme for options in of_linear.values() for scheme in options)
        if not counts:
            raise UsageError("no linear of this model is on a uniform grid, so GPTQ has nothing to hold; choose --format dense or bnb")
        common = max(counts, key=lambda scheme: (counts[scheme], scheme[1] == -1))
        dynamic: dict[str, dict[str, int]] = {}
        for name, options in of_linear.items():
            if not options:
                dynamic[f"-:^{re.escape(name)}$"] = {}
            elif common not in options:
                dynamic[f"+:^{re.escape(name)}$"] = {"bits": options[0][0], "group_size": options[0][1]}
        return cls(*common, act_order, symmetric, bool(of_linear.get("lm_head")), dynamic)

    def config(self, version: int) -> dict[str, object]:
        out = {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.desc_act, "sym": self.sym,
            "lm_head": self.lm_head, "static_groups": False, "true_sequential": True, "damp_percent": 0.01,
            "checkpoint_format": CHECKPOINT_FORMATS[version], "pack_dtype": "int32",
        }  # fmt: skip
        return {**out, "dynamic": dict(self.dynamic)} if self.dynamic else out

    def notes(self) -> list[str]:
        out = []
        if self.dynamic:
            readers = "GPTQModel and vLLM read that, auto-gptq does not"
            out.append(f"{len(self.dynamic)} linears have settings of their own, listed in `dynamic`: {readers}")
        if self.lm_head:
            out.append("lm_head is quantized: GPTQModel and vLLM read that, auto-gptq does not")
        return out
