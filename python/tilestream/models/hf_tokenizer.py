"""A tokenizer from a Hugging Face directory: tokenizer.json, tokenizer_config.json, generation_config.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tilestream.models.errors import ModelLoadError
from tilestream.models.hf_checkpoint import read_json
from tilestream.models.tokenizer import Tokenizer

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_from_hf(path: Path) -> Tokenizer:
    """Load the tokenizer of a model directory.

    Raises:
        ModelLoadError: tokenizer.json is missing or damaged.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        raise ModelLoadError(f"{file}: the file is missing (a directory with only tokenizer.model is not supported)")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelLoadError(f"{file}: not a readable tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = _optional_object(path / "tokenizer_config.json")
    special = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name))) is not None}
    return Tokenizer(
        backend,
        byte_level="ByteLevel" in repr(backend.decoder),
        bos_token_id=backend.token_to_id(special["bos_token"]) if "bos_token" in special else None,
        eos_token_ids=_eos_ids(path, backend, special),
        chat_template=_chat_template(path, config),
        special_tokens=special,
    )


def _optional_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: the top level is {type(value).__name__}; it must be an object")
    return value


def _token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json spells it: a string, or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _eos_ids(path: Path, backend: Backend, special: dict[str, str]) -> set[int]:
    """Ids that end a generation: generation_config.json knows best, then config.json; the tokenizer's EOS as well."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        values = _optional_object(path / name)
        stored = values.get("eos_token_id")
        if stored is None and isinstance(values.get("text_config"), dict):
            stored = values["text_config"].get("eos_token_id")
        found: Iterable[Any] = stored if isinstance(stored, list) else [stored]
        ids = {token_id for token_id in found if isinstance(token_id, int)}
        if ids:
            break
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return ids if eos is None else ids | {eos}


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """The template named "default" of tokenizer_config.json, or a file of its own."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
