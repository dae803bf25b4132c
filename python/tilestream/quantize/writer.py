"""The directory that `--model` loads: written beside its place, and put there when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tilestream.models.errors import ModelLoadError
from tilestream.models.fmpq_checkpoint import FILE_NAME, pack_nibbles
from tilestream.models.tokenizer import Tokenizer
from tilestream.ops import KeyRounding
from tilestream.quantize.gptq import Codes

_TABLE_GROUP = 32  # of embedding and output projection, whose codes have 8 bits


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` if nothing goes wrong and vanishes otherwise.

    Raises:
        FileExistsError: there is something at `path`; if it came while the directory was filled, that stays, and the message
            says where.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; give -o a name that is not taken")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.chmod(0o777 & ~_umask())
    try:
        os.rename(folder, path)
    except OSError as error:
        raise FileExistsError(f"{path} has been taken meanwhile; what was to be there is in {folder}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def code_tensors(name: str, codes: Codes) -> dict[str, torch.Tensor]:
    """A linear's tensors in the file."""
    return {f"{name}.codes": pack_nibbles(codes.q), f"{name}.scale": codes.scale, f"{name}.zero": codes.zero}


def key_rounding_tensors(name: str, rounding: KeyRounding) -> dict[str, torch.Tensor]:
    """What goes with the projection to keys. Feedback that is off in its last bits makes up for a little less, no more."""
    return {f"{name}.offset": rounding.offset, f"{name}.order": rounding.order, f"{name}.feedback": rounding.feedback.half()}


def table_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """An embedding's or output projection's tensors: symmetric codes of 8 bits, weight = (code - 128) * scale."""
    groups = weight.unflatten(1, (-1, _TABLE_GROUP))
    scale = (groups.abs().amax(2) / 127).half()
    steps = groups / scale.float().masked_fill(scale == 0, torch.inf).unsqueeze(2)
    codes = steps.round_().clamp_(-128, 127).add_(128).to(torch.uint8).flatten(1)
    return {f"{name}.codes": codes, f"{name}.scale": scale}


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelLoadError: a tensor is not finite, for the model's weights go beyond float16."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelLoadError(f"{name} is not finite: weights of the model are too large for scales of float16")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE_NAME)
    (folder / FILE_NAME).chmod(0o666 & ~_umask())  # safetensors lets the owner alone read


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer as tokenizer_from_hf reads it."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = dict(tokenizer.special_tokens)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(tokenizer.eos_token_ids)})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
