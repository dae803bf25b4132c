"""Quantised weights as Hugging Face checkpoints store them: GPTQ, AWQ, compressed-tensors.

Each tool cuts a weight [n, k] into tensors of its own beside each other; here they become codes, scales and zeros, or floats
where no packed format has their groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGMLQuantizationType

from tilestream.models.checkpoint import QuantisedTensor, RawTensor
from tilestream.models.errors import ModelLoadError

Parts = Mapping[str, torch.Tensor]
# AWQ interleaves the 8 columns of a word: nibble i holds this one.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_GROUP_K = 32  # the smallest group of a packed format


@dataclass(frozen=True)
class Quantisation:
    """What quantization_config says of a checkpoint's weights.

    Attributes:
        parts: names that a weight's tensors have in the place of "weight"; the first one holds the codes.
        unpack: (those tensors by name) -> the weight, as float32 where its groups are not of consecutive columns, or not of a
            multiple of 32; raises ModelLoadError with what is wrong.
    """

    parts: tuple[str, ...]
    unpack: Callable[[Parts], QuantisedTensor | RawTensor]


def quantisation_of(config: Mapping[str, Any], source: str) -> Quantisation:
    """What to do with the weights of a checkpoint of this quantization_config, which stands in `source`.

    Raises:
        ModelLoadError: a method, or a choice of it, that is not supported.
    """
    if not isinstance(config, Mapping):
        raise ModelLoadError(f"{source}: quantization_config is {type(config).__name__}; it must be an object")
    method = config.get("quant_method")
    makers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    if method not in makers:
        raise ModelLoadError(
            f"{source}: quantization_config has quant_method {method!r}; supported: {', '.join(makers)} "
            "(or a GGUF file, or unquantised weights)"
        )
    return makers[method](config, source)


def _one_of(config: Mapping[str, Any], key: str, default: Any, allowed: tuple, source: str) -> Any:
    value = config.get(key, default)
    if value not in allowed:
        raise ModelLoadError(f"{source}: {key} is {value!r}; supported: {', '.join(map(str, allowed))}")
    return value


def _group_size(config: Mapping[str, Any], key: str, source: str) -> int | None:
    """Consecutive k of a group. 0: all of them; None: the config does not say."""
    if key not in config:
        return None
    value = config[key]
    if value is None or value == -1:
        return 0
    if type(value) is not int or value < 1:
        raise ModelLoadError(f"{source}: {key} is {value!r}; it must be a positive integer, or -1 for one group")
    return value


def _gptq(config: Mapping[str, Any], source: str) -> Quantisation:
    """qweight int32 [k / 8, n] (4 bits), qzeros [groups, n / 8], scales [groups, n], g_idx [k]; AutoGPTQ stores zeros less one,
    a zero of 0 as the greatest code."""
    bits = _one_of(config, "bits", 4, (4, 8), source)
    later = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    group = _group_size(config, "group_size", source)

    def unpack(parts: Parts) -> QuantisedTensor | RawTensor:
        q = _fields(parts["qweight"], bits, 0).T
        zeros = (_fields(parts["qzeros"], bits, 1) + later) % 2**bits
        return _tensor(q, parts["scales"].T, zeros.T, group, bits, parts.get("g_idx"))

    return Quantisation(("qweight", "qzeros", "scales", "g_idx"), unpack)


def _awq(config: Mapping[str, Any], source: str) -> Quantisation:
    """qweight int32 [k, n / 8], qzeros [groups, n / 8], scales [groups, n]."""
    bits = _one_of(config, "bits", config.get("w_bit", 4), (4,), source)
    _one_of(config, "version", "gemm", ("gemm", "GEMM"), source)
    group = _group_size(config, "group_size" if "group_size" in config else "q_group_size", source)
    place = torch.tensor(_AWQ_COLUMNS).argsort()

    def unpack(parts: Parts) -> QuantisedTensor | RawTensor:
        q, zeros = (
            _fields(parts[name], bits, 1).unflatten(1, (-1, 8))[..., place].flatten(1).T for name in ("qweight", "qzeros")
        )
        return _tensor(q, parts["scales"].T, zeros, group, bits)

    return Quantisation(("qweight", "qzeros", "scales"), unpack)


def _compressed_tensors(config: Mapping[str, Any], source: str) -> Quantisation:
    """pack-quantized: weight_packed int32 [n, k / 8]; int-quantized: weight int8 [n, k]; weight_scale [n, groups] both."""
    format = _one_of(config, "format", None, ("pack-quantized", "int-quantized"), source)
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    if len(groups) != 1:
        raise ModelLoadError(f"{source}: config_groups has {len(groups)} groups; supported: one, for all linear layers")
    weights = groups[0]
    bits = _one_of(weights, "num_bits", None, (4, 8) if format == "pack-quantized" else (8,), source)
    _one_of(weights, "type", "int", ("int",), source)
    _one_of(weights, "actorder", None, (None, "weight", "static"), source)
    group = 0 if weights.get("strategy") == "channel" else _group_size(weights, "group_size", source)
    middle = 2 ** (bits - 1)
    codes = "weight_packed" if format == "pack-quantized" else "weight"

    def unpack(parts: Parts) -> QuantisedTensor | RawTensor:
        if format == "pack-quantized":
            q = _fields(parts[codes], bits, 1)[:, : int(parts["weight_shape"][1])]
        else:
            q = parts[codes].int() + middle
        scale, zeros = parts["weight_scale"], parts.get("weight_zero_point")
        if zeros is None:
            zeros = torch.full(scale.shape, middle)
        elif format == "pack-quantized":
            zeros = _fields(zeros, bits, 0)[: scale.shape[0]]
        else:
            zeros = zeros.int() + middle
        return _tensor(q, scale, zeros, group, bits)

    return Quantisation((codes, "weight_scale", "weight_zero_point", "weight_shape"), unpack)


def _fields(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The unsigned integers that int32 words hold along `dim`, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1)) & (2**bits - 1)
    return fields.flatten(dim, dim + 1)


def _group(k: int, num_groups: int, said: int | None) -> int:
    """Consecutive k of a group, at most all of them. Where nothing says: the power of two that makes so many groups."""
    sizes = [2**i for i in range(k.bit_length())] + [k] if said is None else [min(said or k, k)]
    fitting = [size for size in sizes if size and -(-k // size) == num_groups]
    if not fitting:
        wanted = "the config has no group_size, and no power of two fits" if said is None else f"group_size is {said or -1}"
        raise ModelLoadError(f"there are {num_groups} groups of {k} columns, and {wanted}")
    return fitting[-1]


def _columns_of(order: torch.Tensor, k: int, num_groups: int) -> torch.Tensor:
    """g_idx, checked: the group of each column."""
    order = order.long()
    if order.shape != (k,) or not 0 <= int(order.min()) <= int(order.max()) < num_groups:
        found = f" with {int(order.min())} to {int(order.max())}" if order.numel() else ""
        raise ModelLoadError(f"g_idx is {list(order.shape)}{found}; it must be [{k}] with 0 to {num_groups - 1}")
    return order


def _tensor(
    q: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, said: int | None, bits: int, order: torch.Tensor | None = None
) -> QuantisedTensor | RawTensor:
    """The weight of codes [n, k], with scales and zeros [n, groups].

    Args:
        said: consecutive k of a group, as _group_size has it.
        order: the group of each column; None: consecutive ones.
    """
    n, k = q.shape
    if scale.dim() != 2 or scale.shape[0] != n or scale.shape != zeros.shape or not scale.is_floating_point():
        raise ModelLoadError(
            f"codes are {[n, k]}, scales {scale.dtype} {list(scale.shape)}, zeros {list(zeros.shape)}; scales must be floats, "
            f"scales and zeros alike, [{n}, groups]"
        )
    if order is not None:
        order = _columns_of(order, k, scale.shape[1])
        said = int(order.bincount().max()) if said is None else said
    group, scale = _group(k, scale.shape[1], said), scale.float()
    if order is not None:
        whole = order[::group]
        if torch.equal(whole.repeat_interleave(group)[:k], order):
            scale, zeros, order = scale[:, whole], zeros[:, whole], None
    if order is None and (group == k or group % _GROUP_K == 0):
        scale = scale.contiguous()
        zero = None if bool((zeros == 2 ** (bits - 1)).all()) else -zeros.float() * scale
        return QuantisedTensor(q.to(torch.uint8).contiguous(), scale, zero, group, bits)
    columns = torch.arange(k) // group if order is None else order
    values = ((q - zeros[:, columns]) * scale[:, columns]).contiguous()
    return RawTensor(GGMLQuantizationType.F32, values.view(torch.uint8), k)
