"""Logits of every family against transformers in float32: prefill in chunks, decode, several sequences at once."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tilestream.models import load_model

from .conftest import HF_MODELS
from .helpers import PagedRunner

BOUND = 1e-3  # issue 2: logits within 1e-3 in fp32


def _tokens(num: int, seed: int) -> list[int]:
    return torch.randint(2, 258, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _reference(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", HF_MODELS)
def test_logits_match_transformers(name, hf_model):
    reference, path = hf_model(name)
    runner = PagedRunner(load_model(path, dtype="float32").model, num_sequences=2)
    first, second = _tokens(70, 1), _tokens(33, 2)
    logits = [runner.step({0: first[:40]})]  # prefill alone
    mixed = runner.step({1: second[:30], 0: first[40:60]})  # a second sequence's prefill beside a chunk of the first
    logits.append(mixed[30:])
    other = [mixed[:30]]
    for i in range(3):  # decode both
        both = runner.step({0: first[60 + i : 61 + i], 1: second[30 + i : 31 + i]})
        logits.append(both[:1])
        other.append(both[1:])
    logits.append(runner.step({0: first[63:]}))
    for got, tokens in ((logits, first), (other, second)):
        error = (torch.cat(got) - _reference(reference, tokens)).abs().max()
        assert error <= BOUND


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_only_the_rows_asked_for_are_projected(name, hf_model):
    _, path = hf_model(name)
    model = load_model(path, dtype="float32").model
    tokens = _tokens(20, 3)
    all_rows = PagedRunner(model).step({0: tokens})
    rows = torch.tensor([19, 4])
    forward = model.forward
    for wanted, expected in ((rows, all_rows[rows]), (None, all_rows)):
        runner = PagedRunner(model)
        model.forward = lambda step, caches, rows=wanted: forward(replace(step, logits_rows=rows), caches)
        assert torch.equal(runner.step({0: tokens}), expected)


def test_bfloat16_is_the_default_for_hf_weights(hf_model):
    reference, path = hf_model("llama")
    tokens = _tokens(24, 4)
    exact = _reference(reference, tokens)
    plain = _reference(copy.deepcopy(reference).bfloat16(), tokens).float()
    got = PagedRunner(load_model(path).model).step({0: tokens})
    error, plain_error = (got - exact).abs().max(), (plain - exact).abs().max()
    assert 0 < error <= 2 * plain_error


def test_decode_allocates_no_scratch(hf_model):
    _, path = hf_model("qwen3")
    model = load_model(path, dtype="float32").model
    runner = PagedRunner(model)
    runner.step({0: _tokens(40, 5)})
    runner.step({0: [7]})
    before = model._scratch.get(1)
    runner.step({0: [8]})
    assert model._scratch.get(1) is before


def test_positions_past_the_context_are_refused(hf_model):
    _, path = hf_model("llama")
    model = load_model(path, dtype="float32").model
    runner = PagedRunner(model, max_tokens=300)
    with pytest.raises(ValueError, match="positions holds 259; allowed: 0 to 255"):
        runner.step({0: _tokens(260, 6)})
