"""How one request wants its tokens drawn, and where it wants to stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tilestream.constraint import Constraint

MAX_LOGPROBS = 20  # the OpenAI API's limit for `top_logprobs`
MAX_LOGIT_BIAS = 100.0
# What the sample op takes: int64 seeds, an int32 top_k, and float32 for the rest. It checks a whole step at once, so what one
# request may ask for must not fail there.
_SEED_MIN, _SEED_MAX = -(2**63), 2**63 - 1
_MAX_TOP_K = 2**31 - 1
_MIN_TOP_P = 2.0**-126
_MAX_FLOAT = sys.float_info.max


def _number(name: str, value: object, allowed: str, *, low: float, high: float, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    fits = low < value <= high if low_open else low <= value <= high  # NaN does not, and no integer is too large to compare
    if not fits:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _integer(name: str, value: object, allowed: str, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    Args:
        max_tokens: most tokens to generate, >= 1; None: up to the model's context length. With prompt_logprobs also 0:
            the prompt is scored, and nothing generated.
        min_tokens: no end-of-sequence token, stop token or stop string ends the output before it has so many.
        temperature: >= 0; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens; 0 (or -1, as vLLM writes it): off.
        top_p: keep the smallest set of tokens with this probability mass, in (0, 1]; 1: off.
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1]; 0: off.
        repetition_penalty: in [0.001, 1000]; above 1 makes tokens of the prompt and the output less likely; 1: off.
        presence_penalty: in [-2, 2], subtracted once from the logit of every token in the output; 0: off.
        frequency_penalty: in [-2, 2], subtracted once per occurrence in the output; 0: off.
        logit_bias: (token id, bias) pairs or a mapping, biases in [-100, 100], added to these tokens' logits.
        constraint: what every output must look like; None: anything.
        seed: int64; the same seed, prompt and parameters give the same tokens. None: one is drawn.
        stop: a string or strings that end the output; not part of it unless include_stop_str_in_output.
        stop_token_ids: token ids that end the output, besides the model's end-of-sequence tokens.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: None, or how many of the most likely tokens to report at each position, 0..20, besides
            the drawn one, which is always reported then. They are the model's own, before penalties, biases,
            constraints and temperature.
        prompt_logprobs: the same for each token of the prompt but the first.
        include_stop_str_in_output: keep the stop string (or the stop token's text) in the output.
        skip_special_tokens: special tokens leave no text in the output.
    Raises:
        TypeError, ValueError: which parameter, what it was, what is allowed.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if (num := getattr(self, name)) is not None:
                _integer(name, num, f"None or in 0..{MAX_LOGPROBS}", low=0, high=MAX_LOGPROBS)
        if self.max_tokens is not None:
            scores = self.prompt_logprobs is not None
            allowed = "None or at least 0" if scores else "None or at least 1 (0 with prompt_logprobs only)"
            _integer("max_tokens", self.max_tokens, allowed, low=0 if scores else 1)
        _integer("min_tokens", self.min_tokens, "at least 0", low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}")
        _number("temperature", self.temperature, "finite and at least 0", low=0, high=_MAX_FLOAT)
        _integer("top_k", self.top_k, f"0 (off) or in 1..{_MAX_TOP_K}", low=-1, high=_MAX_TOP_K)
        _number("top_p", self.top_p, "in (0, 1]", low=0, high=1, low_open=True)
        _number("min_p", self.min_p, "in [0, 1]", low=0, high=1)
        _number("repetition_penalty", self.repetition_penalty, "in [0.001, 1000]", low=0.001, high=1000)
        _number("presence_penalty", self.presence_penalty, "in [-2, 2]", low=-2, high=2)
        _number("frequency_penalty", self.frequency_penalty, "in [-2, 2]", low=-2, high=2)
        if self.seed is not None:
            _integer("seed", self.seed, "None or an int64", low=_SEED_MIN, high=_SEED_MAX)
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise TypeError(f"constraint must be a Constraint or None, got {self.constraint!r}")
        self._normalise()

    def _normalise(self) -> None:
        """Give the fields that may be written in several ways their one canonical form (the dataclass is frozen)."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for string in stop:
            if not isinstance(string, str):
                raise TypeError(f"stop must be a string or strings, got {string!r}")
            if not string:
                raise ValueError("stop must not contain an empty string: it would end every output at once")
        stop_token_ids = tuple(self.stop_token_ids or ())
        for token_id in stop_token_ids:
            _integer("stop_token_ids", token_id, "token ids, at least 0", low=0)
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        logit_bias = tuple((token_id, bias) for token_id, bias in pairs)
        for token_id, bias in logit_bias:
            _integer("logit_bias", token_id, "of token ids, at least 0", low=0)
            _number("logit_bias", bias, "in [-100, 100] for each token", low=-MAX_LOGIT_BIAS, high=MAX_LOGIT_BIAS)
        object.__setattr__(self, "logit_bias", tuple(sorted(logit_bias)))
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "top_p", max(self.top_p, _MIN_TOP_P))

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before the draw, by more than penalties."""
        return bool(self.logit_bias) or self.constraint is not None or self.min_tokens > 0

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on which tokens were drawn before it, and not through the logits alone."""
        return self.constraint is not None or self.has_penalties

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
