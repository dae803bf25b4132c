"""A model cut among ranks, which are real processes, gives what it gives on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tilestream.quantize.run import Recipe, quantize
from tilestream.sampling_params import SamplingParams

from tests.distributed.model_steps import Load, answers, logits
from tests.distributed.ranks import Ranks
from tests.models.conftest import hf_model  # noqa: F401
from tests.quantize.test_end_to_end import TEXT

TRANSPORTS = ["gloo"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def tokens(num: int, seed: int) -> list[int]:
    return torch.randint(2, 258, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [tokens(num, num) for num in (50, 7, 31, 1)]  # the token budget is 24: prompts come in chunks, beside decodes


def same_answers(ranks: Ranks, load: Load, params: list[SamplingParams], world_size: int, transport: str) -> None:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    want = answers(None, load, prompts, params)
    got = ranks.run(answers, load, prompts, params, world_size=world_size, transport=transport)
    assert got[1:] == [None] * (world_size - 1)
    for (got_tokens, *got_scores), (want_tokens, *want_scores) in zip(got[0], want, strict=True):
        assert got_tokens == want_tokens
        for got_rows, want_rows in zip(got_scores, want_scores, strict=True):
            assert [row.token_id for row in got_rows] == [row.token_id for row in want_rows]
            torch.testing.assert_close(
                [row.logprob for row in got_rows], [row.logprob for row in want_rows], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "qwen3", "gemma3"])
def test_greedy_tokens(name: str, world_size: int, transport: str, ranks: Ranks, hf_model) -> None:
    _, path = hf_model(name)
    same_answers(ranks, Load(path, {"dtype": "float32"}), [GREEDY] * 4, world_size, transport)
