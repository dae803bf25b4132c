"""Parameters are checked when they are made, and the message says what is allowed."""

from __future__ import annotations

import math

import pytest
from tilestream.engine.config import EngineConfig
from tilestream.sampling_params import SamplingParams


def test_defaults_and_canonical_forms() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_k, params.stop) == (16, 1.0, 0, ())
    params = SamplingParams(stop="x", stop_token_ids=[3], top_k=-1, temperature=0)
    assert (params.stop, params.stop_token_ids, params.top_k, params.is_greedy) == (("x",), (3,), 0, True)
    assert hash(params) == hash(SamplingParams(stop=["x"], stop_token_ids=(3,), temperature=0))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_tokens", 0, r"max_tokens must be None or at least 1 \(0 with prompt_logprobs only\), got 0"),
        ("temperature", -0.1, "temperature must be finite and at least 0, got -0.1"),
        ("temperature", math.nan, "got nan"),
        ("temperature", math.inf, "got inf"),
        ("temperature", 10**400, "got 1000"),
        ("top_k", -2, r"top_k must be 0 \(off\) or in 1..2147483647, got -2"),
        ("top_k", 2**31, "got 2147483648"),
        ("top_p", 0, r"top_p must be in \(0, 1\], got 0"),
        ("top_p", 1.5, "got 1.5"),
        ("min_p", 2, r"min_p must be in \[0, 1\], got 2"),
        ("repetition_penalty", 0, r"repetition_penalty must be in \[0.001, 1000\], got 0"),
        ("repetition_penalty", 1e-38, "got 1e-38"),
        ("presence_penalty", 3, r"presence_penalty must be in \[-2, 2\], got 3"),
        ("frequency_penalty", -3, r"frequency_penalty must be in \[-2, 2\], got -3"),
        ("seed", 2**63, "seed must be None or an int64"),
        ("logprobs", 21, r"logprobs must be None or in 0..20, got 21"),
        ("min_tokens", 17, "min_tokens must be at most max_tokens = 16, got 17"),
        ("prompt_logprobs", 21, r"prompt_logprobs must be None or in 0..20, got 21"),
        ("logit_bias", {5: 101}, r"logit_bias must be in \[-100, 100\] for each token, got 101"),
        ("logit_bias", {5: 10**400}, "got 1000"),
        ("logit_bias", {-1: 5}, "logit_bias must be of token ids, at least 0, got -1"),
        ("stop", ["a", ""], "empty string"),
        ("stop_token_ids", [-1], "stop_token_ids must be token ids, at least 0, got -1"),
    ],
)
def test_values_out_of_range(name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1.5),
        ("temperature", "hot"),
        ("top_k", True),
        ("seed", "x"),
        ("stop", [1]),
        ("top_p", None),
        ("logit_bias", {"5": 1}),
        ("constraint", {"type": "object"}),
    ],
)
def test_wrong_types(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"page_size": 8}, r"page_size must be one of \(16, 32, 64\), got 8"),
        ({"kv_cache_tokens": 20}, r"kv_cache_tokens must be at least one page \(32\), got 20"),
        ({"max_model_len": 1}, "max_model_len must be at least 2 .*got 1"),
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_queued_requests": 0}, "max_queued_requests must be at least 1, got 0"),
    ],
)
def test_engine_limits(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineConfig(**{"kv_cache_tokens": 100, "max_model_len": 64, **changes})


def test_the_cache_is_whole_pages() -> None:
    config = EngineConfig(kv_cache_tokens=100, max_model_len=64, max_num_seqs=256, token_budget=16)
    assert (config.num_pages, config.capacity_tokens, config.max_running_requests) == (3, 96, 16)
