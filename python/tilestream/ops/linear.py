"""Linear layers and embeddings on packed weights (csrc/include/tilestream/linear.h has the formats)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from tilestream._native import _C
from tilestream.ops.activation import gelu_tanh_and_mul, silu_and_mul
from tilestream.ops.linear_choice import LinearKernel, kernel_for
from tilestream.ops.memory import Arena
from tilestream.ops.quantise import QuantisedRows

ACTIVATIONS = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}  # what a gate may be


class PackedFormat(IntEnum):
    """How a packed weight stores its values. S: symmetric, the zero point is the middle of the range.

    ROWS: [n, k] as torch has it, for GPUs alone, so that cuBLAS can multiply by the same memory.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    U4G32S = 2
    U4G32 = 3
    U8G32S = 4
    U8G32 = 5
    U4G128S = 6
    U4G128 = 7
    U8G128S = 8
    ROWS_BFLOAT16 = 9
    ROWS_FLOAT16 = 10

    @property
    def is_quantised(self) -> bool:
        """Integers with a scale per group, which multiply quantised activations."""
        return PackedFormat.U4G32S <= self <= PackedFormat.U8G128S

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return {"U4": 4, "U8": 8, "FL": 32}.get(self.name[:2], 16)

    @property
    def group_size(self) -> int:
        """Consecutive k that share a scale, 32 or 128; 0 for the float formats."""
        return (128 if "G128" in self.name else 32) if self.is_quantised else 0

    @property
    def is_symmetric(self) -> bool:
        """Group-quantised without zeros: the zero point is the middle of the range."""
        return self.is_quantised and self.name.endswith("S")

    @property
    def is_row_major(self) -> bool:
        """[n, k] without padding: k a multiple of 8, and x of the weight's own dtype."""
        return self >= PackedFormat.ROWS_BFLOAT16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight matrix [n, k] in the kernels' own order.

    Args:
        data: uint8, 1-D, 64-byte aligned.
        n, k: output and input features.
        format: how `data` is to be read.
    """

    data: torch.Tensor
    n: int
    k: int
    format: PackedFormat

    @staticmethod
    def empty(n: int, k: int, format: PackedFormat, *, arena: Arena | None = None) -> PackedWeight:
        """Room for a packed [n, k] weight, from `arena` if given."""
        format = PackedFormat(format)
        num_bytes = _C.packed_bytes(int(format), n, k)
        data = torch.empty(num_bytes, dtype=torch.uint8) if arena is None else arena.empty(num_bytes)
        return PackedWeight(data, n, k, format)

    @property
    def matrix(self) -> torch.Tensor:
        """A row-major weight as the tensor [n, k] that it is."""
        dtype = torch.float16 if self.format == PackedFormat.ROWS_FLOAT16 else torch.bfloat16
        return self.data.view(dtype).view(self.n, self.k)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device: weights are packed on the CPU.

        Args:
            device: where the linear runs.
        Returns:
            The weight there; itself if it is there already.
        Raises:
            RuntimeError: torch's own, for a device that it does not have.
        """
        return replace(self, data=self.data.to(device))


def linear(
    x: torch.Tensor | QuantisedRows,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    kernel: LinearKernel | None = None,
    act_bits: int = 8,
    gate: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x . W^T (+ bias) on a packed weight: W4A16, W4A8, W8A8, or W4Ax by COMET (2410.12168, section 4).

    Then either y + residual, or with a gate act(y[:, ::2]) * y[:, 1::2]; in float32, before the one rounding (by
    cuBLAS the gate comes after it, and takes another).

    Args:
        x: [num_tokens, k], float32, float16 or bfloat16, last dim contiguous; or rows of integers from an op that
            quantises. For the group-quantised formats, floats are quantised on the way in, as `quantise` does.
        weight: packed [n, k].
        bias: [n], float32.
        out: [num_tokens, n], with a gate [num_tokens, n / 2], as x (integers: float32, float16 or bfloat16); allocated when
            None (integers: float32, or as residual).
        kernel: for row-major weights, which one; None: by num_tokens and the table of `linear_choice`.
        act_bits: of floats that meet a group-quantised weight: 8 quantises them, 16 multiplies them by the dequantised weight.
        gate: "silu" or "gelu_tanh": the rows of weight and bias alternate between gate and up (`interleave_gate_up`).
        residual: [num_tokens, n], as out; may be out itself; not with a gate.
    Returns:
        out. A row's result does not depend on the other rows, bit for bit, but for row-major weights: there
        it depends on the kernel, and with cuBLAS on num_tokens.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    Error: exact in integers within a group; float32 accumulation over groups. Deterministic: yes.
    """
    num_outputs = weight.n if gate is None else weight.n // 2
    if isinstance(x, QuantisedRows):
        if out is None:
            dtype = torch.float32 if residual is None else residual.dtype
            out = torch.empty(x.q.size(0), num_outputs, dtype=dtype, device=x.q.device)
        if act_bits != 8:
            raise ValueError(f"act_bits is {act_bits}; it is for rows of floats, and these are quantised already")
        torch.ops.tilestream.linear_quant(
            x.q, x.scale, x.sum, weight.data, bias, out, n=weight.n, format=weight.format, gate=gate, residual=residual
        )
        return out
    if out is None:
        out = x.new_empty(x.size(0), num_outputs)
    if weight.format.is_row_major:
        kernel = kernel_for(x.device, x.size(0), weight.n, weight.k) if kernel is None else LinearKernel(kernel)
        if kernel == LinearKernel.CUBLAS:
            return _by_cublas(x, weight.matrix, bias, out, gate, residual)
    elif kernel is not None:
        raise ValueError(f"kernel is {kernel}; only row-major weights have a choice, and this one is {weight.format.name}")
    gemv = kernel == LinearKernel.GEMV
    torch.ops.tilestream.linear(
        x, weight.data, bias, out, n=weight.n, format=weight.format, gemv=gemv, act_bits=act_bits, gate=gate, residual=residual
    )
    return out


def _by_cublas(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    gate: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`linear` on a weight [n, k] by torch. A gate takes two products, of every second row each, and an op of its own."""
    if residual is not None and (residual.shape, residual.dtype) != (out.shape, out.dtype):
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.dtype}; it must be as out, {list(out.shape)} {out.dtype}"
        )
    if gate is None:
        if residual is None:
            torch.mm(x, weight.t(), out=out)
        else:
            (out if residual is out else out.copy_(residual)).addmm_(x, weight.t())
        return out if bias is None else out.add_(bias)
    if gate not in ACTIVATIONS:
        raise ValueError(f"gate is {gate!r}; allowed: {', '.join(ACTIVATIONS)}, or none")
    if residual is not None:
        raise ValueError(f"gate is {gate!r} and a residual is given; allowed: one of them")
    if weight.size(0) % 2 != 0:
        raise ValueError(
            f"n is {weight.size(0)}; with a gate the weight's rows alternate between gate and up, so it must be even"
        )
    both = x.new_empty(x.size(0), weight.size(0))
    for i, part in enumerate(both.chunk(2, 1)):
        torch.mm(x, weight[i::2].t(), out=part)
        if bias is not None:
            part.add_(bias[i::2])
    return ACTIVATIONS[gate](both, out=out)


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Alternates rows of gate and of up, as a linear with a gate takes its weight (values; or q, scale and zero) and its bias.

    Args:
        gate, up: [n, ...], of one shape and dtype.
    Returns:
        [2 * n, ...]: gate's row i at 2 i, up's at 2 i + 1.
    Raises:
        ValueError: they differ.
    """
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(f"gate is {list(gate.shape)} {gate.dtype}, up {list(up.shape)} {up.dtype}; they must be alike")
    return torch.stack([gate, up], 1).flatten(0, 1)


def pack_weight(
    values: torch.Tensor | None = None,
    *,
    q: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    group: int | None = None,
    format: PackedFormat | None = None,
    out: PackedWeight | None = None,
) -> PackedWeight:
    """Pack a weight given as floats (FLOAT32, BFLOAT16, ROWS) or as integers with scales (the group-quantised formats).

    Args:
        values: [n, k], float32.
        q: [n, k], uint8: 0..15 for the U4 formats, 0..255 for the U8 ones.
        scale: [n, ceil(k / group)], float32: weight = q * scale + zero; stored as float16.
        zero: as scale; the symmetric formats have none (zero = -8 * scale or -128 * scale).
        group: consecutive k that share a scale, a multiple of format.group_size; None: the smallest that scale's shape allows.
        format: the packed format; needed where `out` is not given.
        out: room for the weight; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    source = values if q is None else q
    if source is None:
        raise ValueError("pack_weight needs values (FLOAT32, BFLOAT16, ROWS) or q and scale (the group-quantised formats)")
    n, k = source.shape
    if out is None:
        out = PackedWeight.empty(n, k, format)
    if group is None:
        unit = out.format.group_size or 1
        group = k if scale is None else -(-k // (scale.size(1) * unit)) * unit
    torch.ops.tilestream.pack_weight(values, q, scale, zero, group, out.data, n=n, k=k, format=out.format)
    return out


def pack_gguf(rows: torch.Tensor, gguf_type: int, k: int, *, format: PackedFormat, skip: int = 0) -> PackedWeight:
    """Pack rows of GGUF blocks without a detour through floats.

    Args:
        rows: [n, bytes per row], uint8, the tensor as it stands in the file.
        gguf_type: ggml's type number: F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K.
        k: input features, a multiple of 32 for quantised types; the last block may have more.
        format: the type's own packed format, or a float one to dequantise.
        skip: leading features of the first block that are left out, a multiple of 32 (of what a rank has of K-quants).
    Returns:
        The packed weight.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    packed = PackedWeight.empty(rows.size(0), k, format)
    n = rows.size(0)
    torch.ops.tilestream.pack_gguf(rows, gguf_type, packed.data, n=n, k=k, panel_begin=0, format=format, skip=skip)
    return packed


def embedding(ids: torch.Tensor, weight: PackedWeight, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of a packed weight, dequantised: a token embedding that shares its memory with a tied lm_head.

    Args:
        ids: [num_tokens], int64, in [0, n).
        weight: packed [n, k].
        dtype: of the result: float32, float16 or bfloat16.
    Returns:
        [num_tokens, k], dtype.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed; on the CPU ids are checked too.
    """
    out = torch.empty(ids.size(0), weight.k, dtype=dtype, device=ids.device)
    torch.ops.tilestream.embedding(ids, weight.data, out, n=weight.n, format=weight.format)
    return out
