"""Quantised weights as Hugging Face checkpoints store them: GPTQ, AWQ, compressed-tensors.

Each tool cuts a weight [n, k] into tensors of its own beside each other; here they become codes, scales and zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilestream.models.checkpoint import QuantisedTensor
from tilestream.models.errors import ModelLoadError

Parts = Mapping[str, torch.Tensor]
# AWQ interleaves the 8 columns of a word: nibble i holds this one.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Quantisation:
    """What quantization_config says of a checkpoint's weights.

    Attributes:
        parts: names that a weight's tensors have in the place of "weight"; the first one holds the codes.
        unpack: (those tensors by name) -> the weight; raises ModelLoadError with what is wrong.
    """

    parts: tuple[str, ...]
    unpack: Callable[[Parts], QuantisedTensor]


def quantisation_of(config: Mapping[str, Any], source: str) -> Quantisation:
    """What to do with the weights of a checkpoint whose config.json has this quantization_config.

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


def _gptq(config: Mapping[str, Any], source: str) -> Quantisation:
    """qweight int32 [k / 8, n] (4 bits), qzeros [k / group, n / 8], scales [k / group, n]; AutoGPTQ stores zeros less one, a zero
    of 0 as the greatest code."""
    bits = _one_of(config, "bits", 4, (4, 8), source)
    later = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def unpack(parts: Parts) -> QuantisedTensor:
        q = _fields(parts["qweight"], bits, 0).T
        zeros = (_fields(parts["qzeros"], bits, 1) + later) % 2**bits
        group = _group(q.shape[1], zeros.shape[0])
        order = parts.get("g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(q.shape[1]) // group):
            raise ModelLoadError(f"{source}: a weight has its channels in another order (desc_act); not supported")
        return _tensor(q, parts["scales"].T, zeros.T, group, bits)

    return Quantisation(("qweight", "qzeros", "scales", "g_idx"), unpack)


def _awq(config: Mapping[str, Any], source: str) -> Quantisation:
    """qweight int32 [k, n / 8], qzeros [k / group, n / 8], scales [k / group, n]."""
    bits = _one_of(config, "bits", config.get("w_bit", 4), (4,), source)
    _one_of(config, "version", "gemm", ("gemm", "GEMM"), source)
    place = torch.tensor(_AWQ_COLUMNS).argsort()

    def unpack(parts: Parts) -> QuantisedTensor:
        q, zeros = (
            _fields(parts[name], bits, 1).unflatten(1, (-1, 8))[..., place].flatten(1).T for name in ("qweight", "qzeros")
        )
        return _tensor(q, parts["scales"].T, zeros, _group(q.shape[1], zeros.shape[1]), bits)

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
    middle = 2 ** (bits - 1)
    codes = "weight_packed" if format == "pack-quantized" else "weight"

    def unpack(parts: Parts) -> QuantisedTensor:
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
        return _tensor(q, scale, zeros, _group(q.shape[1], scale.shape[1]), bits)

    return Quantisation((codes, "weight_scale", "weight_zero_point", "weight_shape"), unpack)


def _fields(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The unsigned integers that int32 words hold along `dim`, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1)) & (2**bits - 1)
    return fields.flatten(dim, dim + 1)


def _group(k: int, num_groups: int) -> int:
    """Consecutive k of a group: all of them, whatever k is, where there is one."""
    return k if num_groups == 1 else -(-k // num_groups)


def _tensor(q: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, group: int, bits: int) -> QuantisedTensor:
    scale, middle = scale.float().contiguous(), 2 ** (bits - 1)
    zero = None if bool((zeros == middle).all()) else -zeros.float() * scale
    return QuantisedTensor(q.to(torch.uint8).contiguous(), scale, zero, group, bits)
