"""Hugging Face checkpoints: safetensors files, seen through GGUF's tensor names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from tilestream.models.checkpoint import QuantisedTensor, RawTensor
from tilestream.models.config import ModelConfig
from tilestream.models.errors import ModelLoadError
from tilestream.models.hf_quantised import Quantisation, quantisation_of

_BLOCK_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
_TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Gemma has four norms per layer, and calls "post_attention_layernorm" what the others do not have.
_GEMMA_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LAYER_PATTERN = re.compile(r"layers\.(\d+)\.(.+)\.(\w+)")
# What AutoGPTQ and AutoAWQ wrote while config.json had no quantization_config -> quant_method, which these may not name.
_OLD_QUANTISATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_json(path: Path) -> Any:
    """A parsed JSON file; ModelLoadError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: the file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not readable JSON: {error}") from error


def quantisation_in(path: Path, values: Mapping[str, Any]) -> Quantisation | None:
    """How the weights of a directory whose config.json has these values are cut into tensors; None: they are whole.

    Raises:
        ModelLoadError: a damaged file, or a method, or a choice of it, that is not supported.
    """
    if values.get("quantization_config"):
        return quantisation_of(values["quantization_config"], str(path / "config.json"))
    for name, method in _OLD_QUANTISATION_FILES.items():
        if (path / name).exists():
            config = read_json(path / name)
            return quantisation_of({"quant_method": method} | config if isinstance(config, dict) else config, str(path / name))
    return None


class HfCheckpoint:
    """The safetensors files of a directory.

    Args:
        path: directory with one safetensors file, or model.safetensors.index.json and its shards.
        config: shape of the model (Gemma's norms are stored as weight - 1).
        quantisation: how weights are cut into tensors; None: they are whole.
    Attributes:
        as_floats: names of the quantised weights read so far that became floats.
    Raises:
        ModelLoadError: missing, damaged or foreign files.
    """

    def __init__(self, path: Path, config: ModelConfig, quantisation: Quantisation | None = None) -> None:
        self.path = path
        self._quantisation, self.is_quantised = quantisation, quantisation is not None
        self._kinds = {"weight", "bias", *(quantisation.parts if quantisation else ())}
        self.as_floats: set[str] = set()
        self._gemma = config.family == "gemma3"
        self._files: dict[Path, Any] = {}
        self._names: dict[str, tuple[Path, str]] = {}
        names = [(file, name) for file in self._shards() for name in self._open(file).keys()]
        suffix = "embed_tokens.weight"
        prefix = next((name.removesuffix(suffix) for _, name in names if name.endswith(suffix)), None)
        if prefix is None:
            raise ModelLoadError(f"{path}: no tensor is named *embed_tokens.weight; not a decoder this library knows")
        for file, name in names:
            canonical = self._canonical(name, prefix)
            if canonical is not None:
                self._names[canonical] = (file, name)

    def _shards(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            single, files = self.path / "model.safetensors", sorted(self.path.glob("*.safetensors"))
            if single not in files and len(files) != 1:
                raise ModelLoadError(
                    f"{self.path}: neither model.safetensors nor {index.name} is there, and {len(files)} other .safetensors "
                    "files are; expected one of these two, or a single file"
                )
            return [single if single in files else files[0]]
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ModelLoadError(f"{index}: weight_map is missing; it must map tensor names to file names")
        return [self.path / Path(shard).name for shard in sorted(set(weight_map.values()))]

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{file}: not a readable safetensors file: {error}") from error
        return self._files[file]

    def _canonical(self, name: str, prefix: str) -> str | None:
        """GGUF's name of a tensor; None for those outside the text model (vision towers, projectors)."""
        stem, _, kind = name.rpartition(".")
        if stem.endswith("lm_head") and kind in self._kinds:
            return f"output.{kind}"
        if not name.startswith(prefix):
            return None
        name = name.removeprefix(prefix)
        layer = _LAYER_PATTERN.fullmatch(name)
        if layer is None or layer[3] not in self._kinds:
            stem, _, kind = name.rpartition(".")
            return f"{_TOP_NAMES[stem]}.{kind}" if stem in _TOP_NAMES else None
        index, stem, kind = layer.groups()
        known = _GEMMA_LAYER_NAMES if self._gemma else _LAYER_NAMES
        return f"blk.{index}.{known.get(stem, stem)}.{kind}"

    @property
    def tensor_names(self) -> list[str]:
        """Weights that are cut into tensors by one name, as if they were whole."""
        kinds = set(self._kinds) - {"bias"}
        stems = (name.rpartition(".") for name in self._names)
        return list(dict.fromkeys(f"{stem}.weight" if kind in kinds else f"{stem}.{kind}" for stem, _, kind in stems))

    def has_tensor(self, name: str) -> bool:
        return name in self._names

    def _get(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise ModelLoadError(f"{self.path}: the tensor {name} (in GGUF naming) is missing")
        file, stored = self._names[name]
        try:
            return self._open(file).get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file}: tensor {stored} is not readable: {error}") from error

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of floats."""
        tensor = self._get(name)
        file, stored = self._names[name]
        if tensor.dtype not in _BLOCK_TYPES or not 1 <= tensor.dim() <= 2 or tensor.numel() == 0:
            raise ModelLoadError(
                f"{file}: tensor {stored} is {tensor.dtype} {list(tensor.shape)}; "
                "supported: float32, float16 or bfloat16 with one or two dimensions"
            )
        return tensor.contiguous()

    def tensor(self, name: str) -> RawTensor | QuantisedTensor:
        """A weight matrix: rows of one-element blocks, or the integers of a quantised one."""
        if self._quantisation is not None:
            stem = name.removesuffix(".weight")
            parts = [kind for kind in self._quantisation.parts if f"{stem}.{kind}" in self._names]
            if parts != ["weight"] and self._quantisation.parts[0] in parts:
                weight = self._unpack(stem, parts)
                if isinstance(weight, RawTensor):
                    self.as_floats.add(name)
                return weight
        values = self._read(name)
        matrix = values if values.dim() == 2 else values.unsqueeze(0)
        return RawTensor(_BLOCK_TYPES[values.dtype], matrix.view(torch.uint8), matrix.shape[1])

    def _unpack(self, stem: str, parts: list[str]) -> QuantisedTensor | RawTensor:
        try:
            return self._quantisation.unpack({kind: self._get(f"{stem}.{kind}") for kind in parts})
        except KeyError as error:
            raise ModelLoadError(f"{self.path}: the tensor {stem}.{error.args[0]} (in GGUF naming) is missing") from error
        except (ModelLoadError, RuntimeError, ValueError, IndexError) as error:
            raise ModelLoadError(f"{self.path}: the tensors of {stem} do not fit each other: {error}") from error

    def vector(self, name: str) -> torch.Tensor:
        """A norm weight or bias as float32."""
        values = self._read(name)
        if values.dim() != 1:
            raise ModelLoadError(f"{self.path}: tensor {name} has shape {list(values.shape)}; one dimension expected")
        values = values.to(torch.float32)
        return values + 1.0 if self._gemma and name.endswith("norm.weight") else values
