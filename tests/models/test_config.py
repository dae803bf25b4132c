"""RoPE rules against transformers' own, and configurations in the older spellings that the hub is full of."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tilestream.layers.rope import RopeConfig
from tilestream.models import ModelLoadError
from tilestream.models.config_hf import config_from_hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

BASE = dict(model_type="llama", hidden_size=512, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=8,
            intermediate_size=1024, vocab_size=1000, max_position_embeddings=4096, rms_norm_eps=1e-6)


def _config(**changes):
    return config_from_hf(BASE | changes, "config.json")


def _assert_like_transformers(parameters: dict) -> None:
    theirs = transformers.LlamaConfig(**(BASE | dict(rope_parameters=dict(parameters))))
    inv_freq, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu")
    ours = _config(rope_parameters=parameters).rope
    # They compute in float32: the difference of two frequencies up to 64 times apart loses six bits.
    torch.testing.assert_close(ours.inv_freq().float(), inv_freq, rtol=64 * 2**-23, atol=0)
    assert abs(ours.magnitude() - magnitude) <= 1e-12


@settings(max_examples=40)
@given(
    theta=st.sampled_from([1e4, 5e5, 1e6]), factor=st.floats(1.0, 64.0), original=st.sampled_from([64, 2048, 8192]),
    low=st.floats(0.5, 2.0), high=st.floats(3.0, 8.0),
)
def test_llama3_and_linear_scaling(theta, factor, original, low, high):
    common = dict(rope_theta=theta, factor=factor)
    _assert_like_transformers(common | dict(rope_type="linear"))
    _assert_like_transformers(common | dict(rope_type="llama3", original_max_position_embeddings=original,
                                            low_freq_factor=low, high_freq_factor=high))


@settings(max_examples=40)
@given(
    theta=st.sampled_from([1e4, 1e6]), factor=st.floats(1.5, 40.0), original=st.sampled_from([256, 4096, 32768]),
    extra=st.sampled_from([{}, dict(attention_factor=1.25), dict(mscale=0.7, mscale_all_dim=1.0), dict(truncate=False),
                           dict(beta_fast=16.0, beta_slow=2.0)]),
)
def test_yarn_scaling(theta, factor, original, extra):
    _assert_like_transformers(dict(rope_type="yarn", rope_theta=theta, factor=factor,
                                   original_max_position_embeddings=original) | extra)


def test_cos_sin_table_is_exact_at_long_positions():
    rope = RopeConfig(theta=1e6, rotary_dim=64)
    table = rope.cos_sin_table(40000)
    position = 39999
    angle = position * rope.inv_freq()
    assert table.shape == (40000, 64) and table.dtype == torch.float32
    assert (table[position, :32].double() - angle.cos()).abs().max() <= 2**-24
    assert (table[position, 32:].double() - angle.sin()).abs().max() <= 2**-24


@pytest.mark.parametrize("changes, expected", [
    (dict(model_type="mistral", sliding_window=1024), [1023] * 8),
    (dict(model_type="mistral", sliding_window=None), [-1] * 8),
    (dict(model_type="llama", sliding_window=1024), [-1] * 8),
    (dict(model_type="qwen2", sliding_window=1024, use_sliding_window=False, max_window_layers=4), [-1] * 8),
    (dict(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=4), [-1] * 4 + [63] * 4),
    (dict(model_type="gemma3_text", sliding_window=64), [63] * 5 + [-1] + [63] * 2),
    (dict(model_type="gemma3_text", sliding_window=64, sliding_window_pattern=4), [63, 63, 63, -1] * 2),
    (dict(model_type="qwen3", sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 4), [-1, 7] * 4),
])
def test_windows(changes, expected):
    assert list(_config(**changes).window_left) == expected


def test_old_rope_spellings():
    old = _config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    assert old.rope == _config(rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=4.0)).rope
    gemma = _config(model_type="gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4,
                    rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (gemma.rope.theta, gemma.rope.rope_type, gemma.rope.factor) == (1e6, "linear", 8.0)
    assert (gemma.rope_local.theta, gemma.rope_local.rope_type) == (1e4, "default")
    assert gemma.layer_rope(5) is gemma.rope and gemma.layer_rope(0) is gemma.rope_local
    assert gemma.sm_scale == 256**-0.5 and gemma.embedding_scale == 512**0.5 and gemma.tied_embeddings


@pytest.mark.parametrize("changes, message", [
    (dict(layer_types=["full_attention"] * 7), "7 layers have an attention type, the model has 8"),
    (dict(layer_types=["linear_attention"] * 8), "layer_types has .'linear_attention'."),
    (dict(model_type="qwen2", layer_types=["sliding_attention"] * 8), "sliding_window is missing"),
    (dict(model_type="mistral", sliding_window=0), "sliding_window is 0; it must be at least 1"),
    (dict(head_dim=20), "head_dim is 20; supported: multiples of 16 up to 256"),
    (dict(partial_rotary_factor=0.3), "RoPE rotates 19 elements of a head; it must be even"),
    (dict(max_position_embeddings=True), "max_position_embeddings is True; it must be an integer"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
     "allowed: 0 < low < high"),
    (dict(rope_scaling="linear"), "rope_scaling is 'linear'; it must be an object"),
    (dict(num_attention_heads=0), "num_attention_heads is 0"),
])
def test_refused(changes, message):
    with pytest.raises(ModelLoadError, match=message):
        _config(**changes)
