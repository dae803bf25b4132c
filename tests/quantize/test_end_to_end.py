"""A model and a text in, a directory out that loads and answers."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tilestream import LLM, SamplingParams
from tilestream.models import ModelLoadError, load_model
from tilestream.models.fmpq_checkpoint import pack_nibbles, unpack_nibbles
from tilestream.models.config_hf import config_from_hf
from tilestream.models.loader import open_checkpoint
from tilestream.placement import Placement
from tilestream.quantize import Recipe, quantize
from tilestream.quantize.config_json import config_json
from tilestream.quantize.source import Source
from tilestream.quantize.writer import new_directory, write_tensors

from tests.models.gguf_files import write_model
from tests.models.helpers import PagedRunner

_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "until", "rain", "comes"]
TEXT = " ".join(_WORDS[(i * i + i // 7) % len(_WORDS)] for i in range(700))[:3000]  # 3,000 bytes
RECIPE = {"num_windows": 12, "window_tokens": 96}


def _logits(path: Path, **options) -> torch.Tensor:
    loaded = load_model(path, **options)
    return PagedRunner(loaded.model).step({0: loaded.tokenizer.encode(TEXT)[:100]})


def _error(path: Path, expected: torch.Tensor, **options) -> float:
    return float((_logits(path, **options) - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "group_size", "rotate"),
    [("llama", 32, True), ("llama", 128, False), ("llama-wide-mlp", 128, True), ("llama-wide-mlp", 32, False)],
)
def test_quantise_load_and_generate(name: str, group_size: int, rotate: bool, hf_model, tmp_path: Path) -> None:
    _, path = hf_model(name)
    out, steps = tmp_path / "out", []
    recipe = Recipe(group_size=group_size, rotate=rotate, int4_share=0.6, **RECIPE)
    share = quantize(str(path), TEXT, out, recipe, lambda done, total, what: steps.append((done, total, what)))
    assert share >= 0.6
    assert steps[-1][:2] == (25, 25)  # five passes over three layers, and tuning on ten of twelve windows
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "int8_share.png", "model.safetensors", "report.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["down_hadamard"] is (rotate and name == "llama-wide-mlp")  # whose MLP has whole blocks of 128
    for layer, values in zip(load_model(out, act_bits="4").model.layers, settings["k4"], strict=True):
        linears = (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)
        assert [linear.k4 for linear in linears] == [values[name] for name in ("qkv", "o", "gate_up", "down")]
    assert all(layer.mlp.down.k4 == 0 for layer in load_model(out).model.layers)  # a CPU gains nothing by 4 bits
    expected = _logits(path, dtype="float32")
    assert _error(out, expected) < 0.6
    assert _error(out, expected, act_bits="4") < 0.6
    exact = _logits(out, dtype="float32")  # what the weights mean; integers and floats read them alike
    assert _error(out, exact, act_bits="16") < 1e-4
    assert _error(out, exact) < 0.1
    runner, tokens = PagedRunner(load_model(out, act_bits="4").model), load_model(out).tokenizer.encode(TEXT)[:100]
    steps = [runner.step({0: [token]}) for token in tokens]  # from the second on a program is replayed
    assert torch.allclose(torch.cat(steps), _logits(out, act_bits="4"), atol=1e-2)
    llm = LLM(out, kv_dtype="int4", act_bits="4", kv_cache_tokens=512)
    answer = llm.generate("the quick brown", SamplingParams(max_tokens=12, ignore_eos=True))[0]
    assert len(answer.token_ids) == 12
    assert llm.tokenizer.encode(TEXT) == LLM(path, kv_cache_tokens=512).tokenizer.encode(TEXT)


def test_fmpq_errs_less_than_rounding_to_nearest(hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    expected = _logits(path, dtype="float32")
    for method in ("rtn", "fmpq"):
        quantize(str(path), TEXT, tmp_path / method, Recipe(method=method, **RECIPE))
    assert _error(tmp_path / "fmpq", expected, act_bits="4") < 0.9 * _error(tmp_path / "rtn", expected, act_bits="4")


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3", "gemma3", "mistral"])
def test_other_families(name: str, hf_model, tmp_path: Path) -> None:
    _, path = hf_model(name)
    expected = _logits(path, dtype="float32")
    for method in ("rtn", "fmpq"):
        quantize(path, TEXT, tmp_path / method, Recipe(method=method, int4_share=0.0, **RECIPE))
    assert _error(tmp_path / "fmpq", expected) < min(0.4, 0.8 * _error(tmp_path / "rtn", expected))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gguf_input(architecture: str, hf_model, tmp_path: Path) -> None:
    model, _ = hf_model(architecture)
    fields = {"attention.sliding_window": 19, "attention.sliding_window_pattern": [True, False, True], "rope.freq_base": 1e6,
              "attention.scale": 96**-0.5} if architecture == "gemma3" else {}  # fmt: skip
    file = write_model(tmp_path / "model.gguf", architecture, model, fields=fields)
    quantize(str(file), TEXT, tmp_path / "out", Recipe(int4_share=0.0, **RECIPE))
    assert _error(tmp_path / "out", _logits(file, dtype="float32")) < 0.6
    tokenizers = [load_model(path).tokenizer for path in (file, tmp_path / "out")]
    assert tokenizers[0].encode(TEXT + " ab\n\tÄ") == tokenizers[1].encode(TEXT + " ab\n\tÄ")
    assert tokenizers[0].eos_token_ids == tokenizers[1].eos_token_ids


def test_frequency_factors_of_a_gguf_file(hf_model, tmp_path: Path) -> None:
    """As files of Llama 3.1 and later have them."""
    model, _ = hf_model("llama")
    factors = torch.linspace(1, 8, 32)
    file = write_model(tmp_path / "model.gguf", "llama", model, extra={"rope_freqs.weight": factors.numpy()})
    quantize(file, TEXT, tmp_path / "out", Recipe(**RECIPE))
    loaded = load_model(tmp_path / "out")
    assert loaded.config.rope == replace(load_model(file).config.rope, interleaved=False)
    assert loaded.config.rope.freq_factors == tuple(factors.tolist())
    assert _error(tmp_path / "out", _logits(file)) < 0.6


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 31, "31 RoPE frequency factors; expected 32"),
        ([1.0] * 31 + [0.0], "a RoPE frequency factor is not positive and finite"),
        ("8", "freq_factors is '8'; it must be a list of numbers"),
    ],
)
def test_frequency_factors_that_are_wrong(factors: object, message: str, hf_model) -> None:
    _, path = hf_model("llama")
    values = json.loads((path / "config.json").read_text())
    with pytest.raises(ModelLoadError, match=message):
        config_from_hf(values | {"rope_parameters": {"rope_theta": 1e4, "freq_factors": factors}}, "config.json")


def test_metadata_that_config_json_cannot_express(hf_model, tmp_path: Path) -> None:
    model, _ = hf_model("llama")
    file = write_model(tmp_path / "model.gguf", "llama", model)
    opened = open_checkpoint(file)
    config = replace(Source(opened.checkpoint, opened.config).config, sm_scale=1.0)
    with pytest.raises(ModelLoadError, match="cannot express this file's sm_scale"):
        config_json(file, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "awq"}, "method is 'awq'; allowed: fmpq, rtn"),
        ({"group_size": 64}, "group_size is 64; allowed: 32, 128"),
        ({"int4_share": 1.5}, "int4_share is 1.5; it must be between 0 and 1"),
        ({"num_windows": 0}, "0 windows of 96 tokens"),
        ({"num_windows": 1}, "tuning holds windows out, so it needs 2 at least"),
        ({"num_windows": 400}, "400 windows of 96 need 38400"),
    ],
)
def test_recipes_that_do_not_work(change: dict, message: str, hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    with pytest.raises(ValueError, match=message):
        quantize(str(path), TEXT, tmp_path / "out", Recipe(**RECIPE | change))
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_models_that_do_not_work(hf_model, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model 'nowhere.gguf'"):
        quantize("nowhere.gguf", TEXT, tmp_path / "out", Recipe(**RECIPE))
    _, odd = hf_model("llama-odd-sizes")
    with pytest.raises(ModelLoadError, match="hidden_size is 144; quantised weights need multiples of 32"):
        quantize(str(odd), TEXT, tmp_path / "out", Recipe(**RECIPE))
    _, path = hf_model("llama")
    quantize(str(path), TEXT, tmp_path / "out", Recipe(method="rtn", **RECIPE))
    with pytest.raises(FileExistsError, match="out exists"):
        quantize(str(path), TEXT, tmp_path / "out", Recipe(**RECIPE))
    with pytest.raises(ModelLoadError, match="quantised already"):
        quantize(str(tmp_path / "out"), TEXT, tmp_path / "again", Recipe(**RECIPE))


def test_weights_that_are_not_finite(hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"blk.1.ffn_up.weight holds NaN or infinity"):
        quantize(str(broken), TEXT, tmp_path / "out", Recipe(**RECIPE))
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(hf_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, not at the end of the work."""
    _, path = hf_model("llama")
    monkeypatch.setattr("tilestream.quantize.report.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        quantize(str(path), TEXT, tmp_path / "out", Recipe(**RECIPE))
    assert not (tmp_path / "out").exists()


def test_directories_that_do_not_load(hf_model, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    with pytest.raises(ModelLoadError, match="act_bits 4 needs a directory"):
        load_model(path, act_bits="4")
    with pytest.raises(ValueError, match="act_bits is '5'; allowed: auto, 4, 8, 16"):
        load_model(path, act_bits="5")
    out = tmp_path / "out"
    quantize(str(path), TEXT, out, Recipe(method="rtn", **RECIPE))
    config, weights = (out / "config.json").read_text(), load_file(out / "model.safetensors")

    def broken(change, match: str) -> None:
        values, tensors = json.loads(config), dict(weights)
        change(values["quantization_config"], tensors)
        (out / "config.json").write_text(json.dumps(values))
        save_file(tensors, out / "model.safetensors")
        with pytest.raises(ModelLoadError, match=match):
            load_model(out, act_bits="4")

    broken(lambda q, t: q.update(version=3), "version 3")
    broken(lambda q, t: q.update(group_size=128.0), "group_size 128.0")
    broken(lambda q, t: q.pop("down_hadamard"), "down_hadamard None; it must be true or false")
    broken(lambda q, t: q.update(down_hadamard="false"), "down_hadamard 'false'; it must be true or false")
    broken(lambda q, t: q.update(down_hadamard=True), "blk.0.ffn_down has 192 columns; they must be a multiple of 128")
    broken(lambda q, t: q.update(k4=q["k4"][:2]), "no k4 for blk.2.attn_q")
    broken(lambda q, t: q["k4"][0].update(o=96), "k4 of blk.0.attn_output is 96")
    broken(lambda q, t: t.pop("blk.1.ffn_up.scale"), "the tensor blk.1.ffn_up.scale is missing")
    broken(lambda q, t: t.update({"blk.0.attn_norm.weight": torch.ones(4)}), r"attn_norm.weight has 4 elements; expected 128")
    broken(lambda q, t: t.update({"blk.0.more.weight": torch.ones(4)}), "1 tensors belong to no known part")


def test_int4_where_it_cannot_run(hf_model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, path = hf_model("llama")
    out, recipe = tmp_path / "out", Recipe(method="rtn", group_size=32, **RECIPE)
    quantize(path, TEXT, out, recipe)
    with pytest.raises(ModelLoadError, match="act_bits 4 needs 4-bit weights, and dtype is bfloat16; allowed: auto"):
        load_model(out, act_bits="4", dtype="bfloat16")

    class Ampere(Placement):
        has_int4 = True

    ampere = Ampere(torch.device("cuda"), torch.bfloat16, blocked_kv=False, asynchronous=True)
    with pytest.raises(
        ModelLoadError, match="need weights in groups of 128 on a GPU, and these are in groups of 32; take act_bits 8"
    ):
        load_model(out, act_bits="4", placement=ampere)
    with suppress(RuntimeError, AssertionError):  # where there is no GPU
        load_model(out, placement=ampere)
    assert "groups of 32; they meet INT8 activations" in caplog.text


def test_a_share_that_blocks_do_not_reach(hf_model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    share = quantize(hf_model("llama")[1], TEXT, tmp_path / "out", Recipe(method="rtn", int4_share=1.0, **RECIPE))
    assert share < 1.0
    assert f"{share:.1%}".replace("%", " %") in caplog.text and "100.0 % was wanted" in caplog.text


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="out has been taken meanwhile; what was to be there is in") as raised:
        with new_directory(tmp_path / "out") as folder:
            (folder / "file").write_text("work of hours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/file").touch()
    assert Path(str(raised.value).rpartition(" in ")[2], "file").read_text() == "work of hours"
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link exists"), new_directory(tmp_path / "link"):
        pass


def test_weights_too_large_for_their_scales(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="blk.0.attn_q.scale is not finite"):
        write_tensors(tmp_path, {"blk.0.attn_q.scale": torch.full((2, 2), 1e6).half()})


def test_others_may_read_it(hf_model, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        quantize(hf_model("llama")[1], TEXT, tmp_path / "out", Recipe(method="rtn", **RECIPE))
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o644"}


def test_nibbles() -> None:
    q = torch.randint(0, 16, (3, 96), dtype=torch.uint8)
    packed = pack_nibbles(q)
    assert packed.shape == (3, 48)
    assert (packed[0, 0] & 15, packed[0, 0] >> 4) == (q[0, 0], q[0, 16])
    assert torch.equal(unpack_nibbles(packed), q)
