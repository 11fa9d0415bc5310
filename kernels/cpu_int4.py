"""Four-bit weights on the CPU as torch packs them: `_weight_int4pack_mm_for_cpu` for few rows, unpacked by chunks for many.

torch's operator takes bfloat16 activations, accumulates in float32 and holds weight = (code − 8)·scale + zero. Narrower codes are
widened to four bits when they are bound. For many rows a chunk of the weight is unpacked into a scratch that the cache holds, and
multiplied there in float32. Knows records of weights and torch; not which way is faster here.
Legend: M tokens, O out, I in, G groups, S inputs of a group, C blocks of rows, H bytes of a block (two rows each).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.weights import UniformWeight
from .scratch import CHUNK, scratch

GROUP_SIZES = (256, 128, 64, 32)  # what torch's operator accepts
PADDED_ROWS = 64  # weights are padded to whole blocks of any instruction set, so that unpacking knows one layout only
_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
_matmul = torch.ops.aten._weight_int4pack_mm_for_cpu
Product = Callable[[Tensor], Tensor]


@cache
def block_rows() -> int:
    """Rows of a block: an input's bytes hold rows 0, 1, … of the block in their low nibbles and the second half in the high ones.

    Found by packing the row numbers themselves, since it differs between instruction sets (AVX-512: 64, AVX2: 32).
    ValueError if this torch packs in yet another way."""
    rows = torch.arange(PADDED_ROWS, dtype=torch.int32).unsqueeze(1).expand(-1, 4)
    low, high = (_pack(part.contiguous(), 2) for part in (rows % 16, rows // 16))
    for block in (64, 32):
        a, b = (part.view(-1, 4, block // 2) for part in (low, high))
        order = torch.cat(((a & 15) + 16 * (b & 15), (a >> 4) + 16 * (b >> 4)), dim=-1).long()
        if torch.equal(order, torch.arange(PADDED_ROWS).view(-1, 1, block).expand_as(order)):
            return block
    raise ValueError(f"torch {torch.__version__} packs int4 weights in an unknown order on {torch.backends.cpu.get_cpu_capability()}")


@dataclass(frozen=True)
class Int4Weight:
    """packed uint8 [O', I/2] in torch's order, O' = O rounded up to 64; scales_zeros bfloat16 [G, O', 2]."""

    packed: Tensor
    scales_zeros: Tensor
    group_size: int
    out_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.packed.shape[1] * 2

    @property
    def kind(self) -> str:
        return f"int4 group {self.group_size}"

    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed, self.scales_zeros

    def products(self, half_pays: Callable[[torch.dtype], bool], rows: int) -> dict[str, Product]:
        """Ways to multiply x [M, I] → [M, O]; those in bfloat16 only where it pays."""
        result: dict[str, Product] = {"int4": self.matmul, "unpack": self.unpacked_matmul}
        if half_pays(torch.bfloat16):
            result["unpack+bfloat16"] = lambda x: self.unpacked_matmul(x, torch.bfloat16)
        return result

    def matmul(self, x_MI: Tensor) -> Tensor:
        """bfloat16 [M, O]: torch's packed operator."""
        y = _matmul(x_MI.to(torch.bfloat16), self.packed, self.group_size, self.scales_zeros)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features]

    def unpacked_matmul(self, x_MI: Tensor, compute: torch.dtype = torch.float32) -> Tensor:
        """[M, O] in `compute`, a chunk of blocks at a time."""
        x, (out, inputs) = x_MI.to(compute), self.shape
        block, padded = block_rows(), self.packed.shape[0]
        y = x.new_empty(x.shape[0], padded)
        step = max(1, CHUNK // (inputs * block))
        for first in range(0, padded // block, step):
            chunk_I2CH = self.unpacked(first, min(first + step, padded // block))
            product = x @ chunk_I2CH.view(inputs, -1).to(compute)
            count = chunk_I2CH.shape[2]
            target = y[:, first * block : (first + count) * block].view(-1, count, 2, block // 2)
            target.copy_(product.view(-1, 2, count, block // 2).transpose(1, 2))
        return y[:, :out]

    def unpacked(self, first: int, last: int) -> Tensor:
        """float32 [I, 2, C, H] of blocks [first, last), in this thread's scratch: valid until the next chunk.

        Sixteen bytes of a block move as one element, so that all that follows runs over long rows."""
        block, inputs, count = block_rows(), self.shape[1], last - first
        half = block // 2
        packed = self.packed.view(-1, inputs, half)[first:last].view(torch.complex128)
        by_input = packed.transpose(0, 1).contiguous().view(torch.uint8).view(inputs, count * half)
        values = scratch(inputs * count * block).view(inputs, 2, count * half)
        values[:, 0].copy_(by_input & 15)
        values[:, 1].copy_(by_input >> 4)
        both = self.scales_zeros[:, first * block : last * block].float().view(-1, count, 2, half, 2).transpose(1, 2)
        scales, zeros = (part.reshape(both.shape[0], 1, -1) for part in both.unbind(-1))
        grouped = values.view(scales.shape[0], -1, scales.shape[2])
        torch.addcmul(zeros.sub_(scales, alpha=8), grouped, scales, out=grouped)
        return values.view(inputs, 2, count, half)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, I] of rows ids int64 [N]."""
        half = block_rows() // 2
        block, row = ids // (2 * half), ids % (2 * half)
        bytes_NI = self.packed.view(-1, self.shape[1], half)[block, :, row % half]
        codes = torch.where((row < half).unsqueeze(1), bytes_NI & 15, bytes_NI >> 4).float()
        scales, zeros = self.scales_zeros[:, ids].float().permute(2, 1, 0).unsqueeze(-1)
        return codes.view(len(ids), scales.shape[1], -1).sub_(8).mul_(scales).add_(zeros).view(len(ids), -1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I]: what the packed operator multiplies with, computed in float32."""
        (out, inputs), block = self.shape, block_rows()
        dense = torch.empty(self.packed.shape[0], inputs, dtype=dtype)
        for first in range(self.packed.shape[0] // block):
            dense[first * block : (first + 1) * block] = self.unpacked(first, first + 1).view(inputs, block).t()
        return dense[:out]


def pack_int4(base: UniformWeight) -> Int4Weight:
    """Widen to four bits and pack. ValueError says why torch's operator cannot hold this weight.

    Codes are shifted, per group, so that an integer zero point lies at 8 where the codes in use allow (always below four bits):
    then no zero has to be rounded to bfloat16 and masked weights are exactly 0."""
    block_rows()
    rows, columns = base.shape
    if base.bits > 4:
        raise ValueError(f"torch ships no packed operator for {base.bits}-bit groups on the CPU")
    if base.group_index is not None:
        raise ValueError("torch's operator needs contiguous groups and group_index is set")
    stored = columns // base.groups
    fitting = [g for g in GROUP_SIZES if stored % g == 0]
    if not fitting:
        raise ValueError(f"torch's operator needs groups of a multiple of 32; group_size is {stored}")
    codes, zeros, scales = base.codes_OI().int(), base.zeros_OG(), base.scales.float()
    grouped = codes.view(rows, base.groups, stored)
    shift = torch.minimum(torch.maximum(8 - zeros.round(), -grouped.amin(-1)), 15 - grouped.amax(-1))
    codes = codes + shift.int().repeat_interleave(stored, dim=1)
    offsets = (8 - zeros - shift) * scales
    repeat = stored // fitting[0]
    both = torch.stack((scales, offsets), dim=-1).repeat_interleave(repeat, dim=1)
    padding = -rows % PADDED_ROWS
    packed = _pack(F.pad(codes, (0, 0, 0, padding)).contiguous(), 2)
    both = F.pad(both, (0, 0, 0, 0, 0, padding)).transpose(0, 1).to(torch.bfloat16).contiguous()
    return Int4Weight(packed, both, fitting[0], rows)
