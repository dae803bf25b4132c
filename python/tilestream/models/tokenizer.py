"""Text to token ids and back, on the `tokenizers` library. Built by gguf_tokenizer or hf_tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from tilestream.models.chat_template import ChatTemplate

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print stand for themselves, the others are U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: the tokenizer proper; its post-processor adds BOS (and EOS) where the model wants them.
        byte_level: tokens are spelled in GPT-2's byte alphabet; otherwise as sentencepiece spells them.
        bos_token_id: or None.
        eos_token_ids: tokens that end a generation.
        chat_template: Jinja source, or None.
        special_tokens: bos_token, eos_token, ... as the chat template sees them.
    Attributes:
        vocab_size: number of token ids, added tokens included.
        special_tokens: as given.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        byte_level: bool,
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        chat_template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._byte_level, self.special_tokens = byte_level, dict(special_tokens)
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template, special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """Its Jinja source."""
        return None if self._chat_template is None else self._chat_template.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in the text are recognised.

        Args:
            text: any Unicode text.
            add_special_tokens: add what the model expects around a text (BOS). Chat templates write it themselves,
                so their output is encoded with False.
        Raises:
            TypeError, ValueError: `text` is not a str, or has lone surrogates.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}; it must be str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at index {error.start}; it must be valid Unicode") from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to the output; b"" for special tokens and ids without a token."""
        return b"" if token_id in self._special_ids else self.special_token_bytes(token_id)

    def special_token_bytes(self, token_id: int) -> bytes:
        """As token_bytes, but special tokens are spelled out."""
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            spelled = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False. See ChatTemplate.render.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self._chat_template is None:
            raise ValueError("this model has no chat template; send a plain prompt instead of messages")
        return self._chat_template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs)
