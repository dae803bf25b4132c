"""A model of random logits under the real runner: a token's logits are decided by the token and its position alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.runner import ModelRunner
from tilestream.placement import CPU

# Bytes, some of JSON's common strings, a special token, and two ends: the first one is a text's, the second a turn's.
TOKENS = [bytes([i]) for i in range(256)] + [b'{"', b'": ', b'", "', b'"}', b"true", b"}]", b"12", b"  ", b"null", b'"a"']
SPECIAL = len(TOKENS)
EOS = SPECIAL + 1, SPECIAL + 2
NO_TOKEN = SPECIAL + 3  # the model's vocabulary is larger than the tokenizer's
VOCAB_SIZE = SPECIAL + 6
_ENDS_LATER = [TOKENS.index(text) for text in (b'"', b"}", b"]", b'"}', b"}]")]


class JsonTokenizer:
    """TOKENS; texts are split into bytes."""

    vocab_size = NO_TOKEN
    eos_token_ids = frozenset(EOS)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return TOKENS[token_id] if token_id < SPECIAL else b""

    def special_token_bytes(self, token_id: int) -> bytes:
        return self.token_bytes(token_id) or b"<special>"


class RandomModel:
    """No layers; likes to close what is open, so that answers come to an end."""

    config = SimpleNamespace(
        vocab_size=VOCAB_SIZE, num_layers=0, num_qo_heads=1, num_kv_heads=1, head_dim=64, window_left=(), max_position=10_000
    )
    placement = CPU
    communicator = None

    def forward(self, step, kv_caches) -> torch.Tensor:
        self._step = step
        rows = torch.arange(step.token_ids.size(0)) if step.logits_rows is None else step.logits_rows
        return self.logits_of(rows)

    def logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        step = self._step
        pairs = [(int(step.token_ids[row]), int(step.positions[row])) for row in rows]
        return torch.stack([self.logits(*pair) for pair in pairs]) if pairs else torch.empty(0, VOCAB_SIZE)

    @staticmethod
    def logits(token_id: int, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(token_id * 100_003 + position)
        values = torch.randn(VOCAB_SIZE, generator=generator)
        values[_ENDS_LATER] += 3
        return values


def make_engine(**changes: object) -> Engine:
    limits = {"page_size": 16, "kv_cache_tokens": 16 * 400, "max_model_len": 1600, "token_budget": 64, "seed": 0} | changes
    config = EngineConfig(**limits)
    return Engine(ModelRunner(RandomModel(), config, kv_dtype="float32"), JsonTokenizer(), config)
