"""GGUF reading: metadata, limits, and damaged files. Whatever the bytes, the answer is a model or a ModelLoadError."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tilestream.models import ModelLoadError, load_model
from tilestream.models.config_gguf import config_from_gguf
from tilestream.models.gguf_reader import GgufFile
from tilestream.models.loader import resolve

from .conftest import build_hf_model
from .gguf_files import finish, write_model


@pytest.fixture(scope="module")
def demo() -> GgufFile:
    return GgufFile(resolve("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    return write_model(path, "llama", build_hf_model("llama"), kind=lambda name: Type.Q8_0)


def _metadata_file(path: Path, **fields) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
         list: writer.add_array}[type(value)](f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    finish(writer)
    return path


def test_metadata_matches_the_gguf_package(tmp_path):
    fields = dict(text="käse \U0001f9c0", number=7, real=0.5, yes=True, words=["a", "", "\u00fc\n", "b" * 300],
                  numbers=[1, 2, 3], reals=[0.5, -1.0])
    path = _metadata_file(tmp_path / "m.gguf", **fields)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for name in fields:
        expected = theirs.fields[f"llama.{name}"].contents()
        assert ours.value(f"llama.{name}") == expected
    assert ours.value("llama.absent") is None and ours.value("llama.absent", 3) == 3


def test_demo_model(demo):
    config = config_from_gguf(demo)
    assert (config.num_layers, config.hidden_size, config.num_qo_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (64, 1536, 49152)
    assert config.rope.interleaved and config.rope.theta == 100000.0
    assert config.tied_embeddings and config.max_position == 8192
    merges = demo.array("tokenizer.ggml.merges", str)
    assert len(merges) == 48900 and merges[0] == "\u0120 t"


@pytest.mark.parametrize("call, message", [
    (lambda f: f.integer("llama.text"), r"llama\.text is 'abc'; it must be an integer"),
    (lambda f: f.integer("llama.yes"), r"llama\.yes is True; it must be an integer"),
    (lambda f: f.string("llama.number"), r"llama\.number is 7; it must be a string"),
    (lambda f: f.number("llama.nan"), r"llama\.nan is nan; it must be finite"),
    (lambda f: f.array("llama.numbers", str), r"llama\.numbers holds 1; it must be an array of str"),
    (lambda f: f.boolean("llama.absent"), r"the metadata key llama\.absent is missing"),
    (lambda f: f.tensor("absent.weight"), r"the tensor absent\.weight is missing"),
])
def test_wrong_metadata(tmp_path, call, message):
    file = GgufFile(_metadata_file(tmp_path / "m.gguf", text="abc", number=7, yes=True, nan=float("nan"), numbers=[1]))
    with pytest.raises(ModelLoadError, match=message) as raised:
        call(file)
    assert str(tmp_path / "m.gguf") in str(raised.value)


def test_unsupported_tensor_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", gguf.quants.quantize(np.ones((4, 32), dtype=np.float32), Type.Q5_0), raw_dtype=Type.Q5_0)
    finish(writer)
    with pytest.raises(ModelLoadError, match="tensor w has type Q5_0; supported: F32, F16, BF16, Q4_0"):
        GgufFile(tmp_path / "m.gguf").tensor("w")


@pytest.mark.parametrize("content, message", [
    (b"", "starts with b''"),
    (b"PK\x03\x04 a zip file", "not a GGUF file: it starts with"),
    (b"GGUF", "probably truncated or damaged"),
    (b"GGUF" + (99).to_bytes(4, "little") + bytes(16), "version 99"),
    (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "probably truncated or damaged"),
])
def test_not_a_gguf_file(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        load_model(path)


def test_truncated_anywhere(good, tmp_path):
    data = good.read_bytes()
    data_begin = GgufFile(good)._reader.data_offset
    cuts = {*range(0, 400), *range(400, data_begin, 97), *range(data_begin, len(data) - 40, len(data) // 25)}
    path = tmp_path / "cut.gguf"
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(ModelLoadError):
            load_model(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes(good, tmp_path, seed):
    data = good.read_bytes()
    header = GgufFile(good)._reader.data_offset
    rng = random.Random(seed)
    path = tmp_path / "flipped.gguf"
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            broken[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(broken)
        try:
            load_model(path)
        except ModelLoadError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("fields, message", [
    ({"block_count": None}, "the metadata key llama.block_count is missing"),
    ({"block_count": 4}, r"the tensor blk\.3\.attn_norm\.weight is missing|blk\.3\.attn_q\.weight is missing"),
    ({"block_count": 2}, r"9 tensors belong to no known part of this model family: blk\.2\."),
    ({"embedding_length": 64}, r"token_embd\.weight has shape \[300, 128\]; expected \[300, 64\]"),
    ({"feed_forward_length": 96}, r"blk\.0\.ffn_gate\.weight has shape \[192, 128\]; expected \[96, 128\]"),
    ({"attention.head_count": 0}, "attention.head_count is 0"),
    ({"attention.head_count_kv": 3}, "num_qo_heads is 4; it must be a multiple of num_kv_heads, 3"),
    ({"attention.head_count": [4, 2, 4]}, "attention.head_count differs between layers"),
    ({"attention.key_length": 72, "attention.value_length": 72}, "head_dim is 72; supported: multiples of 16"),
    ({"attention.key_length": 32}, "key_length is 32 and value_length is 64; they must be equal"),
    ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_eps is 0.0"),
    ({"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; supported: none, linear, yarn"),
    ({"rope.freq_base": 0.5}, "RoPE theta is 0.5"),
    ({"expert_count": 8}, "mixture-of-experts models are not supported"),
    ({"context_length": "many"}, "llama.context_length is 'many'; it must be an integer"),
])
def test_wrong_configuration(tmp_path, fields, message):
    path = write_model(tmp_path / "m.gguf", "llama", build_hf_model("llama"), fields=fields)
    with pytest.raises(ModelLoadError, match=message):
        load_model(path)


def test_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    finish(writer)
    with pytest.raises(ModelLoadError, match="general.architecture is 'mamba'; supported: llama, qwen2, qwen3, gemma3"):
        load_model(tmp_path / "m.gguf")
