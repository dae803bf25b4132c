"""One engine, wherever its kernels are: the CPU backend's, or the CUDA kernels on the emulator or a GPU."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from gguf import GGMLQuantizationType

from tests.models.conftest import VOCAB_SIZE, build_hf_model
from tests.models.gguf_files import quantise_model, write_model
from tilestream import SamplingParams
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.runner import ModelRunner
from tilestream.models import load_model
from tilestream.ops.linear_choice import LinearKernel
from tilestream.placement import CPU, Placement
from tilestream.testing import Backend

CONFIG = EngineConfig(kv_cache_tokens=512, max_model_len=64, page_size=16, max_num_seqs=4, token_budget=24, seed=0)


def placement_on(backend: Backend, dtype: torch.dtype) -> Placement:
    return CPU if backend.name == "cpu" else Placement(backend.device, dtype, blocked_kv=False, asynchronous=True)


def answers(
    path, placement: Placement, prompts: list[list[int]], num_tokens: int, *, dtype: str, kv_dtype: str
) -> list[list[int]]:
    """Greedy answers, several at a time, prompts in chunks."""
    loaded = load_model(path, dtype=dtype, placement=placement)
    engine = Engine(ModelRunner(loaded.model, CONFIG, kv_dtype=kv_dtype), loaded.tokenizer, CONFIG)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            tokens[delta.request_id] += delta.token_ids
    return list(tokens.values())


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in (3, 30, 17)]


@pytest.mark.simt
def test_same_tokens_as_transformers(backend: Backend, hf_model, prompts) -> None:
    """In float32 throughout, greedy tokens are transformers' own."""
    model, path = hf_model("llama")
    got = answers(path, placement_on(backend, torch.float32), prompts, 4, dtype="float32", kv_dtype="float32")
    for prompt, answer in zip(prompts, got, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert answer == logits.argmax(-1).tolist()


@pytest.mark.simt(archs=(80, 90))
def test_near_transformers_in_bfloat16(backend: Backend, hf_model, prompts) -> None:
    """As a GPU runs it: bfloat16 weights, activations and cache. Tokens may differ where the choice was close."""
    model, path = hf_model("qwen3")
    got = answers(path, placement_on(backend, torch.bfloat16), prompts, 3, dtype="bfloat16", kv_dtype="bfloat16")
    assert_near_best(model, prompts, got)


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_weights(backend: Backend, kind: str, prompts, tmp_path) -> None:
    """Weights of a GGUF file as they are, int8 activations, an int8 cache."""
    model = build_hf_model("llama")
    quantised = lambda name: getattr(GGMLQuantizationType, kind)  # noqa: E731
    path = write_model(tmp_path / "model.gguf", "llama", model, kind=quantised, fields={"rope.freq_base": 10000.0})
    got = answers(path, placement_on(backend, torch.bfloat16), prompts, 3, dtype="auto", kv_dtype="int8")
    quantise_model("llama", model, quantised)
    assert_near_best(model, prompts, got)


def assert_near_best(model, prompts: list[list[int]], got: list[list[int]]) -> None:
    """Every token's logit, after those before it, is the largest or near it."""
    for prompt, answer in zip(prompts, got, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        gap = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float(gap.max()) < 0.05 * float(logits.abs().max())


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="allowed: cpu, cuda"):
        Placement.of(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="sees 0 GPUs here; allowed: cpu$|this build has no CUDA kernels"):
        Placement.of("cuda")


@pytest.mark.simt(archs=(80, 90))
def test_batch_invariant_bits(backend: Backend, hf_model, prompts) -> None:
    """A request's log-probabilities are the same bits alone and in a batch, whatever the chunks of its prompt."""
    placement = placement_on(backend, torch.bfloat16)
    if backend.name != "cpu":
        placement = dataclasses.replace(placement, linear_kernel=LinearKernel.FLAT)
    loaded = load_model(hf_model("llama")[1], dtype="bfloat16", placement=placement)

    def logprobs(requests: list[list[int]], token_budget: int) -> list[list[float]]:
        config = dataclasses.replace(CONFIG, batch_invariant=True, token_budget=token_budget)
        engine = Engine(ModelRunner(loaded.model, config), loaded.tokenizer, config)
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0)
        found: dict[str, list[float]] = {str(i): [] for i in range(len(requests))}
        for i, prompt in enumerate(requests):
            engine.add_request(str(i), prompt, params)
        while engine.has_work():
            for delta in engine.step():
                found[delta.request_id] += [entry.logprob for entry in delta.logprobs]
        return list(found.values())

    together = logprobs(prompts, 24)
    assert together == [logprobs([prompt], budget)[0] for prompt, budget in zip(prompts, (24, 11, 64), strict=True)]
