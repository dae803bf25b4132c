"""Tokenizers against transformers', on texts that break naive ones; exact bytes of tokens; chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tilestream.models import ModelLoadError
from tilestream.models.chat_template import ChatTemplate
from tilestream.models.gguf_reader import GgufFile
from tilestream.models.gguf_tokenizer import tokenizer_from_gguf
from tilestream.models.hf_tokenizer import tokenizer_from_hf
from tilestream.models.loader import resolve
from tilestream.models.tokenizer import Tokenizer

from .conftest import save_tokenizer
from .gguf_files import finish

DEMO = resolve("smollm2-135m-instruct")
TEXTS = [
    "", " ", "\n", "Hello world", "  two  spaces\n\n\n tabs\t\tx", "\r\n\r\n windows", "a" * 200, "trailing   ",
    "def f(x):\n    return x**2  # 12345 67\n\nif __name__ == '__main__':\n\tf(1)",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 flags \U0001f1e9\U0001f1ea ok",
    "中文字符和标点，。 日本語のテスト 한국어 시험", "Привет МИР, ÀÉ naïve café e\u0301 ﬁ", "العربية עברית",
    "can't I'LL we've CAMELCase fooBar_baz iPhone", "a/b//c $100+<=>~| {json: [1, 2.5e-3]} https://x.y/?z=1&w=2",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|im_end|> <|not_special|>",
    "\u200b\ufeff zero width \x00\x01 control", "3.14159 1,000,000 2024-01-31",
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return tokenizer_from_gguf(GgufFile(DEMO))


@pytest.fixture(scope="module")
def demo_reference():
    return transformers.AutoTokenizer.from_pretrained(DEMO.parent, gguf_file=DEMO.name)


@pytest.mark.parametrize("text", TEXTS)
def test_demo_model_matches_transformers(demo, demo_reference, text):
    ids = demo.encode(text)
    assert ids == demo_reference(text)["input_ids"]
    assert demo.decode(ids) == demo_reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_demo_model_splits_every_digit(demo):
    # "smollm" splits before any numeral, not only 0-9. transformers forgets this for GGUF files, llama.cpp does it.
    assert [demo.decode([i]) for i in demo.encode("1234")] == ["1", "2", "3", "4"]
    assert demo.encode("\u00bd\u2167") == demo.encode("\u00bd") + demo.encode("\u2167")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_survives(demo, text):
    ids = demo.encode(text)
    raw = b"".join(demo.token_bytes(i) for i in ids)
    assert raw.decode(errors="replace") == demo.decode(ids)
    if not any(demo.is_special(i) for i in ids):
        known = {demo.token_bytes(i) for i in range(17, 300)}  # this vocabulary lacks a few control and lead bytes
        assert raw == b"".join(bytes([byte]) for byte in text.encode() if bytes([byte]) in known)


def test_demo_model_special_tokens(demo):
    assert demo.vocab_size == 49152 and demo.bos_token_id == 1
    assert {2} <= demo.eos_token_ids <= {0, 2}
    assert demo.is_special(2) and demo.token_bytes(2) == b"" and demo.decode([2]) == ""
    assert demo.token_bytes(49152) == b""
    split_emoji = demo.encode("\U0001f9c0")
    assert len(split_emoji) > 1 and b"".join(map(demo.token_bytes, split_emoji)) == "\U0001f9c0".encode()


@pytest.mark.parametrize("text", [None, 7, b"bytes", ["list"]])
def test_only_text_is_encoded(demo, text):
    with pytest.raises(TypeError, match="it must be str"):
        demo.encode(text)


def test_lone_surrogates_are_refused(demo):
    with pytest.raises(ValueError, match="lone surrogate at index 1"):
        demo.encode("a\ud800")


# --- other pre-tokenizers and vocabularies, in GGUF files written here ---


def _write(path: Path, architecture: str, tokens: list[str], types: list[int], **parts) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {"tokenizer_model": "gpt2", **parts}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    finish(writer)
    return path


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2", "deepseek-r1-qwen"])
def test_pre_tokenizers_match_transformers(pre, tmp_path):
    demo = GgufFile(DEMO)
    tokens = demo.array("tokenizer.ggml.tokens", str)[:3000]  # transformers takes seconds for all 49,152
    known = set(tokens)
    merges = [m for m in demo.array("tokenizer.ggml.merges", str) if m.replace(" ", "") in known]
    path = _write(tmp_path / "t.gguf", "llama", tokens, demo.array("tokenizer.ggml.token_type", int)[:3000],
                  tokenizer_pre=pre, bos_token_id=1, eos_token_id=2, add_bos_token=False, token_merges=merges)
    ours = tokenizer_from_gguf(GgufFile(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    whole_words = pre in ("llama-bpe", "tekken")  # ours, as llama.cpp, takes a word that is a token without merging
    for text in TEXTS:
        if not whole_words:
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True,
                                                               clean_up_tokenization_spaces=False)


def _sentencepiece_vocabulary(special: list[str], user_defined: list[str]) -> tuple[list[str], list[int], list[float]]:
    """Special tokens, bytes, then pieces of a small merge tree, as sentencepiece orders them."""
    text = "the cat sat on the mat and the dog ran to the hat in the rain; return the value of the function".split()
    pieces: dict[str, None] = {}
    for length in range(2, 9):
        for word in text:
            spelled = "\u2581" + word
            pieces.update((spelled[i : i + length], None) for i in range(0, len(spelled) - length + 1, length - 1))
    characters = sorted({*"".join(pieces), *"abcdefghijklmnopqrstuvwxyz.,;:!?'()=\n0123456789", "\u2581"})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *user_defined, *bytes_, *pieces, *characters]
    types = [2 if t == "<unk>" else 3 for t in special] + [4] * len(user_defined) + [6] * 256
    types += [1] * (len(pieces) + len(characters))
    first = len(tokens) - len(pieces) - len(characters)
    scores = [0.0] * first + [-float(i) for i in range(len(pieces) + len(characters))]
    return tokens, types, scores


SENTENCEPIECE_TEXTS = [*TEXTS, "the cat and the dog", "  return the value\n\n\nof the function  ", "hat<s>rain</s> mat"]


def test_sentencepiece_matches_transformers(tmp_path):
    tokens, types, scores = _sentencepiece_vocabulary(["<unk>", "<s>", "</s>"], [])
    common = dict(tokenizer_model="llama", token_scores=scores, bos_token_id=1, eos_token_id=2, unk_token_id=0)
    path = _write(tmp_path / "ours.gguf", "llama", tokens, types, **common)
    # transformers gives "llama" files a rule of its own for spaces after special tokens; its "phi3" follows llama.cpp.
    _write(tmp_path / "theirs.gguf", "phi3", tokens, types, **common)
    ours = tokenizer_from_gguf(GgufFile(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="theirs.gguf")
    for text in SENTENCEPIECE_TEXTS:
        ids = ours.encode(text)
        assert ids[0] == 1  # BOS is this vocabulary's default
        assert ids[1:] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode("  two \U0001f600")) == "  two \U0001f600"
    assert b"".join(map(ours.token_bytes, ours.encode("\u00fc x"))) == " \u00fc x".encode()


def test_gemma_matches_transformers(tmp_path):
    tokens, types, scores = _sentencepiece_vocabulary(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n\n\n", "  ", "   ", "    ", "<b>"]
    )
    path = _write(tmp_path / "g.gguf", "gemma3", tokens, types, tokenizer_model="llama", token_scores=scores,
                  bos_token_id=2, eos_token_id=1, unk_token_id=3, pad_token_id=0, add_space_prefix=False)
    ours = tokenizer_from_gguf(GgufFile(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in [*SENTENCEPIECE_TEXTS, "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "<b>the</b>"]:
        ids = ours.encode(text)
        assert ids == [2, *theirs(text, add_special_tokens=False)["input_ids"]]
        if not any(map(ours.is_special, ids[1:])):
            assert ours.decode(ids) == text == b"".join(map(ours.token_bytes, ids)).decode()
    assert ours.eos_token_ids == {1, 5}


@pytest.mark.parametrize("parts, message", [
    (dict(tokenizer_model="t5"), "tokenizer.ggml.model is 't5'; supported: 'gpt2', 'llama'"),
    (dict(tokenizer_pre="new-thing", token_merges=["a b"]), "tokenizer.ggml.pre is 'new-thing'; supported: default"),
    (dict(tokenizer_pre="gpt-2"), "tokenizer.ggml.merges is missing"),
    (dict(tokenizer_pre="gpt-2", token_merges=["a zzz"]), "tokenizer.ggml.merges do not fit the tokens"),
    (dict(tokenizer_pre="gpt-2", token_merges=["a b"], bos_token_id=99), "bos_token_id is 99; it must be between"),
    (dict(tokenizer_model="llama"), "tokenizer.ggml.scores is missing"),
    (dict(tokenizer_model="llama", token_scores=[0.0]), "4 tokens have 1 scores"),
])
def test_wrong_tokenizer_metadata(tmp_path, parts, message):
    path = _write(tmp_path / "t.gguf", "llama", ["<eos>", "a", "b", "ab"], [3, 1, 1, 1], **parts)
    with pytest.raises(ModelLoadError, match=message):
        tokenizer_from_gguf(GgufFile(path))


# --- Hugging Face directories ---


def _hf_directory(path: Path, **files: object) -> Path:
    save_tokenizer(path)
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_hf_directory(tmp_path):
    path = _hf_directory(
        tmp_path,
        tokenizer_config={"bos_token": {"content": "<bos>"}, "eos_token": "<eos>",
                          "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"},
        generation_config={"eos_token_id": [0, 5]},
        config={"eos_token_id": 7},
    )
    ours = tokenizer_from_hf(path)
    assert ours.bos_token_id == 1 and ours.eos_token_ids == {0, 5}
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "<bos>hi"
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
        assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()


def test_hf_eos_comes_from_config_when_nothing_better_is_there(tmp_path):
    ours = tokenizer_from_hf(_hf_directory(tmp_path, config={"text_config": {"eos_token_id": [3, 4]}}))
    assert ours.eos_token_ids == {3, 4} and ours.bos_token_id is None
    with pytest.raises(ValueError, match="no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hi"}])


def test_hf_tokenizer_missing_or_damaged(tmp_path):
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: the file is missing"):
        tokenizer_from_hf(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelLoadError, match="not a readable tokenizer"):
        tokenizer_from_hf(tmp_path)


# --- chat templates ---

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Tom & Jerry</b> \u00fc"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


def test_demo_chat_template_matches_transformers(demo, demo_reference):
    for messages in (MESSAGES, MESSAGES[1:2]):
        for add in (True, False):
            expected = demo_reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            assert demo.apply_chat_template(messages, add_generation_prompt=add) == expected


def test_chat_template_helpers():
    source = (
        "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}{{ m | tojson }}\n{% endfor %}"
        "{% generation %}{{ tools | tojson(indent=2) }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
        "{% if thinking %} on{% endif %}{{ eos_token }}"
    )
    template = ChatTemplate(source, {"eos_token": "</s>"})
    messages = [{"role": "skip", "content": ""}, {"role": "user", "content": "<ü&>"}]
    got = template.render(messages, tools=[{"name": "f"}], thinking=True)
    assert got == '{"role": "user", "content": "<ü&>"}\n[\n  {\n    "name": "f"\n  }\n]4 on</s>'


@pytest.mark.parametrize("source, message", [
    ("{% if %}", "the chat template is not valid Jinja"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[7].content.x }}", "cannot render these messages"),
    ("{{ messages.append(1) }}", "cannot render these messages"),
    ("{{ ''.__class__.__mro__ }}", "cannot render these messages"),
])
def test_chat_template_failures_are_value_errors(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).render(MESSAGES)
