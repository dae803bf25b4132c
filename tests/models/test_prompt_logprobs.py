"""Logprobs of a prompt against transformers in float32, through the whole engine: chunks, paged cache, soft cap."""

from __future__ import annotations

import pytest
import torch
from tilestream import LLM, SamplingParams

from .test_forward import BOUND, _reference, _tokens


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma3", "gemma3-soft-cap"])
def test_prompt_logprobs_match_transformers(name, hf_model):
    reference, path = hf_model(name)
    llm = LLM(path, dtype="float32", token_budget=48, kv_cache_tokens=1024)
    prompts = [_tokens(length, seed) for seed, length in enumerate((1, 2, 70, 101))]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=3))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
        assert [entry.token_id for entry in output.prompt_logprobs] == prompt[1:]
        exact = _reference(reference, prompt).log_softmax(-1)
        for position, entry in enumerate(output.prompt_logprobs):
            assert abs(entry.logprob - float(exact[position, entry.token_id])) <= BOUND
            best = exact[position].topk(3).values.tolist()
            assert all(abs(logprob - b) <= BOUND for (_, logprob), b in zip(entry.top, best, strict=True))


def test_in_bfloat16_too(hf_model):
    """There the projection gives bfloat16 first, for each piece of rows anew."""
    reference, path = hf_model("llama")
    prompt = _tokens(80, 9)
    (output,) = LLM(path, kv_cache_tokens=1024).generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))
    exact = _reference(reference, prompt).log_softmax(-1)
    errors = [abs(e.logprob - float(exact[i, e.token_id])) for i, e in enumerate(output.prompt_logprobs)]
    assert 0 < torch.tensor(errors).mean() <= 0.05 and len(output.token_ids) == 1
