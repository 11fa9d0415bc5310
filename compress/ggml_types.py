"""The block types of ggml that GGUF files and llama.cpp hold weights in: the legacy ones and the k-quants, each one row.

A weight is d·s·code − m·t: d and m in float16, one of each a super-block; s and t small codes, one of each a group of it (the legacy types
have one group and neither). Knows numbers only; how the bytes of a block lie is pipelines/formats/ggml_blocks'.
Source: ggml-quants.h and k_quants of ggml (github.com/ggml-org/llama.cpp), as read by the `gguf` package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

GgmlName = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
GridName = Literal["uniform", GgmlName]


@dataclass(frozen=True)
class GgmlType:
    """`columns` of a super-block in groups of `group_size`; `scale_bits` of a small code, 0 where there are none. With `minima` codes count
    from 0 and a minimum is taken off; without, codes (and small codes) are signed and 0 is on the grid. `fallback`, as llama.cpp has it, is
    the type of rows that are no multiple of `columns`."""

    bits: int
    columns: int
    group_size: int
    scale_bits: int
    minima: bool
    fallback: GgmlName | None = None

    @property
    def groups(self) -> int:
        """Of a super-block."""
        return self.columns // self.group_size

    @property
    def small_codes(self) -> int:
        """Of a super-block: its groups' scales, then their minima."""
        return 0 if not self.scale_bits else self.groups * (2 if self.minima else 1)

    @property
    def zero(self) -> int:
        """The code whose value is 0, where there are no minima."""
        return 0 if self.minima else 1 << (self.bits - 1)

    @property
    def scale_zero(self) -> int:
        """The small code that stands for 0."""
        return 0 if self.minima or not self.scale_bits else 1 << (self.scale_bits - 1)

    @property
    def block_bits(self) -> int:
        """Of a super-block, all included."""
        return self.columns * self.bits + self.small_codes * self.scale_bits + (32 if self.minima else 16)


GGML_TYPES: Mapping[str, GgmlType] = {
    "q4_0": GgmlType(4, 32, 32, 0, False),
    "q4_1": GgmlType(4, 32, 32, 0, True),
    "q5_0": GgmlType(5, 32, 32, 0, False),
    "q5_1": GgmlType(5, 32, 32, 0, True),
    "q8_0": GgmlType(8, 32, 32, 0, False),
    "q2_k": GgmlType(2, 256, 16, 4, True, "q4_0"),
    "q3_k": GgmlType(3, 256, 16, 6, False, "q4_0"),
    "q4_k": GgmlType(4, 256, 32, 6, True, "q5_0"),
    "q5_k": GgmlType(5, 256, 32, 6, True, "q5_1"),
    "q6_k": GgmlType(6, 256, 16, 8, False, "q8_0"),
}
OF_BITS: Mapping[int, GgmlName] = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
"""The usual type by the bits of a code."""


def type_for(name: str, in_features: int, masked: bool = False) -> GgmlName:
    """The type that rows of so many columns get where `name` is requested: its fallback where they are no multiple of its super-blocks.
    ValueError, with the numbers, where they are none of the fallback's either, and for `masked` rows where the type has minima."""
    wanted, result = GGML_TYPES[name], cast(GgmlName, name)
    if in_features % wanted.columns:
        other = "" if wanted.fallback is None else f" and of {wanted.fallback}, which takes its place, 32"
        if wanted.fallback is None or in_features % GGML_TYPES[wanted.fallback].columns:
            raise ValueError(
                f"in_features {in_features} does not fit: a block of {name} has {wanted.columns} columns{other}; set grid: uniform"
            )
        result = wanted.fallback
    if masked and GGML_TYPES[result].minima:
        without = ", ".join(other for other, layout in GGML_TYPES.items() if not layout.minima)
        raise ValueError(
            f"{result} has no code for 0, since it has minima, and the mask removes weights; grids for pruned models: {without}"
        )
    return result


def as_settings(grid: str) -> dict[str, Any]:
    """What a type of ggml says of bits, groups and symmetry; nothing for a uniform grid."""
    if grid == "uniform":
        return {}
    layout = GGML_TYPES[grid]
    return {"bits": layout.bits, "group_size": layout.group_size, "symmetric": not layout.minima, "float_zeros": False}
