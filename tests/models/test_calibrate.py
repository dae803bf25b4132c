"""Calibration of the unified maximum: the ranges are right, and the layers decode with what follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tilestream import LLM
from tilestream.calibrate import use_softmax_ranges, write_softmax_ranges
from tilestream.models import load_model
from tilestream.ops import KeyRounding

from .helpers import PagedRunner

WINDOW = 70
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3


def _calls(runner: PagedRunner, tokens: list[int]) -> list[dict]:
    """What each layer's attention op is called with in one step, and the lse that it gives."""
    calls = []

    def watch(attend, q, *args, **kwargs):
        lse = torch.empty(q.shape[:2])
        attend(q, *args[:8], lse, *args[9:], **kwargs)
        calls.append({"lse": lse, **kwargs})

    for layer in runner.model.layers:
        layer.attention._attend = lambda *args, attend=layer.attention._attend, **kwargs: watch(attend, *args, **kwargs)
    runner.step({0: tokens})
    return calls


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_ranges_agree_with_the_log_sum_exps(name: str, hf_model, tmp_path: Path) -> None:
    _, path = hf_model(name)
    llm = LLM(path, dtype="float32", kv_cache_tokens=256)
    write_softmax_ranges(llm, TEXT, tmp_path / "ranges.json", window_tokens=WINDOW)
    tokens = llm.tokenizer.encode(TEXT)
    lse = [[] for _ in llm.engine.runner.model.layers]
    for begin in range(0, len(tokens) - WINDOW + 1, WINDOW):
        for layer, call in zip(
            lse, _calls(PagedRunner(load_model(path, dtype="float32").model), tokens[begin : begin + WINDOW]), strict=True
        ):
            layer.append(call["lse"])
    ranges = json.loads((tmp_path / "ranges.json").read_text())["softmax_ranges"]
    assert len(lse[0]) == 3
    for (low, high), layer in zip(ranges, map(torch.cat, lse), strict=True):
        # Of n keys, the largest logit is at most the log-sum-exp, and at least that less log n.
        assert layer.min() - math.log(WINDOW) <= low <= layer.min() + 1e-3
        assert layer.max() - math.log(WINDOW) <= high <= layer.max() + 1e-3


def test_layers_pass_on_what_the_ranges_allow(hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    file = tmp_path / "ranges.json"
    file.write_text(json.dumps({"softmax_ranges": [[1.0, 9.0], [-20.0, 20.0], [-100.0, 100.0]]}))
    runner = PagedRunner(load_model(path, dtype="float32").model)
    for kv_dtype, allowed in (("bfloat16", (True, True, False)), ("float16", (True, False, False))):
        use_softmax_ranges(runner.model, file, kv_dtype=kv_dtype)
        unified = [layer.attention.unified_max for layer in runner.model.layers]
        assert tuple(x is not None for x in unified) == allowed
        assert 1.0 < unified[0] < 9.0
    assert [call["unified_max"] for call in _calls(runner, list(range(2, 2 + WINDOW)))] == unified


def test_keys_less_an_offset_have_other_ranges(hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    file = tmp_path / "ranges.json"
    file.write_text(json.dumps({"softmax_ranges": [[1.0, 9.0]] * 3}))
    model = load_model(path, dtype="float32").model
    model.layers[1].attention.key_rounding = KeyRounding(torch.ones(2, 64), torch.empty(0), torch.empty(0))
    for kv_dtype, allowed in (("int8", [True, True, True]), ("int4", [True, False, True])):
        use_softmax_ranges(model, file, kv_dtype=kv_dtype)
        assert [layer.attention.unified_max is not None for layer in model.layers] == allowed


def test_files_and_texts_that_do_not_fit(hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    file = tmp_path / "ranges.json"
    file.write_text(json.dumps({"softmax_ranges": [[0.0, 1.0]]}))
    with pytest.raises(ValueError, match="softmax ranges of 1 layers; the model has 3"):
        LLM(path, kv_cache_tokens=256, softmax_ranges=file)
    llm = LLM(path, kv_cache_tokens=256)
    with pytest.raises(ValueError, match="a window needs 512"):
        write_softmax_ranges(llm, TEXT, file)
    with pytest.raises(ValueError, match="window_tokens is 64; allowed: more than 64"):
        write_softmax_ranges(llm, TEXT, file, window_tokens=64)
