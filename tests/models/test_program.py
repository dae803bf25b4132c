"""A replayed step gives what the ops give, and a step whose buffers moved is recorded again."""

from __future__ import annotations

import pytest

from tilestream import LLM, SamplingParams
from tilestream.layers import program
from tilestream.models import llama

PROMPTS = ["The capital of France is", "One, two, three, four,", "def fibonacci(n):"]


def answers(llm: LLM) -> list[list[int]]:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    return [output.token_ids for output in llm.generate(PROMPTS, params)]


def test_replay_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    monkeypatch.setattr(program._C.Program, "end", lambda self, end=program._C.Program.end: (recorded.append(self), end(self)))
    replayed = answers(LLM(kv_cache_tokens=2048))
    num_recordings = len(recorded)
    monkeypatch.setattr(llama, "_MAX_PROGRAM_TOKENS", 0)
    assert answers(LLM(kv_cache_tokens=2048)) == replayed
    assert len(recorded) == num_recordings  # with programs off, nothing was recorded
    assert 0 < num_recordings < 20  # 40 steps, most of them replays
    # Prompts end without the projection to logits (norm and matrix: two launches), decodes with it.
    sizes = {p.num_launches for p in recorded}
    assert len(sizes) == 2 and max(sizes) - min(sizes) == 2 and min(sizes) > 0


def test_one_recording_at_a_time() -> None:
    first, second = program._C.Program(), program._C.Program()
    first.begin()
    with pytest.raises(RuntimeError, match="already being recorded"):
        second.begin()
    first.end()
    second.begin()
    second.end()
    assert second.num_launches == 0
