"""A model cut among ranks, which are real processes, gives what it gives on one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tilestream.quantize import Recipe, quantize
from tilestream.sampling_params import SamplingParams
from tilestream.testing import Ranks

from tests.distributed.model_steps import Group, Load, answers, logits
from tests.quantize.test_end_to_end import TEXT


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def tokens(num: int, seed: int) -> list[int]:
    return torch.randint(2, 258, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [tokens(num, num) for num in (50, 7, 31, 1)]  # the token budget is 24: prompts come in chunks, beside decodes


_alone: dict[str, Any] = {}


def alone(function: Callable, *args: Any) -> Any:
    """What one rank gives, computed once."""
    key = repr((function.__name__, args))
    if key not in _alone:
        _alone[key] = function(None, *args)
    return _alone[key]


def same_answers(ranks: Ranks, load: Load, params: list[SamplingParams], group: Group) -> None:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    want = alone(answers, load, prompts, params)
    got, *others = ranks.call(group.run, answers, load, prompts, params)
    assert others == [None] * 3
    for (got_tokens, *got_scores), (want_tokens, *want_scores) in zip(got, want, strict=True):
        assert got_tokens == want_tokens
        for got_rows, want_rows in zip(got_scores, want_scores, strict=True):
            assert [row.token_id for row in got_rows] == [row.token_id for row in want_rows]
            torch.testing.assert_close(
                [row.logprob for row in got_rows], [row.logprob for row in want_rows], atol=1e-4, rtol=1e-4
            )


def as_good_logits(ranks: Ranks, load: Load, group: Group) -> None:
    """Integer activations turn the last bit of a sum, in which ranks differ, into a step of their own; the next layer's then
    are others altogether. So several ranks err differently from one, and may err twice as much, against float activations."""
    exact, _ = alone(logits, replace(load, options=load.options | {"act_bits": "16"}), PROMPTS[0])
    one, weight_bytes = alone(logits, load, PROMPTS[0])
    parts = ranks.call(group.run, logits, load, PROMPTS[0])[: group.world_size]
    several = torch.cat([part for part, _ in parts], 1)
    assert (several - exact).norm() <= 2 * (one - exact).norm() + 1e-5 * exact.norm()
    assert (several - one).norm() <= 3 * (one - exact).norm() + 1e-5 * exact.norm()
    assert sum(num_bytes for _, num_bytes in parts) <= 1.3 * weight_bytes  # KV heads that ranks share, finer groups


@pytest.fixture(params=[(size, transport) for transport in ("collectives", "shared memory") for size in (2, 4)], ids=str)
def group(request: pytest.FixtureRequest) -> Group:
    return Group(*request.param)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-soft-cap"])
def test_greedy_tokens(name: str, group: Group, ranks: Ranks, hf_model) -> None:
    if name == "qwen2" and group.world_size > 2:
        pytest.skip("two query heads")
    same_answers(ranks, Load(hf_model(name)[1], {"dtype": "float32"}), [GREEDY] * 4, group)


@pytest.mark.parametrize("world_size", [2, 3])
def test_odd_sizes(world_size: int, ranks: Ranks, hf_model) -> None:
    """Three query heads of 80 elements share a KV head; no size is a multiple of 128."""
    load = Load(hf_model("llama-odd-sizes")[1], {"dtype": "float32"})
    same_answers(ranks, load, [GREEDY] * 4, Group(world_size, "shared memory"))


def draws(seed: int) -> list[SamplingParams]:
    """Of every kind: from few candidates, from masses, from whole rows, and what only rank 0 knows of."""
    kinds = [
        {"top_k": 20}, {"top_k": 5, "top_p": 0.8}, {"top_k": 300}, {"top_p": 0.9}, {"temperature": 0.0, "logprobs": 3},
        {"top_k": 50, "frequency_penalty": 0.5}, {"temperature": 0.0}, {"top_k": 9, "logprobs": 0, "prompt_logprobs": 2},
        {"temperature": 0.0, "logit_bias": ((7, 5.0),), "min_tokens": 3}, {"top_k": 256, "min_p": 0.01},
        {}, {"temperature": 0.6, "min_p": 0.02}, {"temperature": 1.5, "top_p": 0.7, "min_p": 0.001},
    ]  # fmt: skip
    return [SamplingParams(**{"temperature": 1.0, "max_tokens": 10, "seed": seed + i} | kind) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("overlaps", [False, True])
def test_draws(overlaps: bool, group: Group, ranks: Ranks, hf_model) -> None:
    same_answers(ranks, Load(hf_model("qwen3")[1], {"dtype": "float32"}, overlaps=overlaps), draws(3), group)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int4"])
def test_default_types(kv_dtype: str, group: Group, ranks: Ranks, hf_model) -> None:
    same_answers(ranks, Load(hf_model("llama")[1], kv_dtype=kv_dtype), [GREEDY] * 4, group)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_smollm2(world_size: int, ranks: Ranks) -> None:
    """9 query heads and 3 KV heads."""
    group = Group(world_size, "shared memory")
    load = Load("smollm2-135m-instruct", {"act_bits": "16"}, kv_dtype="bfloat16")
    same_answers(ranks, load, [GREEDY, *draws(0)[:2]], group)
    as_good_logits(ranks, Load("smollm2-135m-instruct"), group)


@pytest.fixture(scope="module")
def fmpq(hf_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 4 bits in groups of 128, most channels of activations of 4 bits, Hadamard matrices inside the MLP; likes
    one next token far more than others, so that the noise of those decides nothing."""
    folder = tmp_path_factory.mktemp("fmpq")
    shutil.copytree(hf_model("llama-wide-mlp")[1], folder / "float")
    tensors = load_file(folder / "float/model.safetensors")
    tensors["model.embed_tokens.weight"] *= 60
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(77, 0).contiguous()
    save_file(tensors, folder / "float/model.safetensors")
    recipe = Recipe(group_size=128, int4_share=0.6, num_windows=12, window_tokens=96)
    quantize(str(folder / "float"), TEXT, folder / "quantised", recipe)
    return folder / "quantised"


@pytest.mark.parametrize("act_bits", ["4", "8", "16"])
def test_4_bit_weights(act_bits: str, group: Group, ranks: Ranks, fmpq: Path) -> None:
    load = Load(fmpq, {"act_bits": act_bits})
    same_answers(ranks, load, [GREEDY] * 4, group)
    as_good_logits(ranks, load, group)
