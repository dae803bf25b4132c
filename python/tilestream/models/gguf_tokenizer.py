"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") or sentencepiece BPE ("llama"), split as llama.cpp does."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tilestream.models.errors import ModelLoadError
from tilestream.models.gguf_reader import GgufFile
from tilestream.models.tokenizer import Tokenizer

# llama.cpp's token types (llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + _WORDS % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regular expressions, applied one after the other to the pieces of the one before.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# A word that is a token as a whole is taken without merging, and BOS is the default (llama-vocab.cpp).
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
# Tokens that end a turn in the chat formats of these families, whatever eos_token_id says.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
_ID_KEYS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id"}


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describes.

    Raises:
        ModelLoadError: missing or damaged keys, or a tokenizer model or pre-tokenizer that is not supported.
    """
    model = file.string("tokenizer.ggml.model")
    tokens = file.array("tokenizer.ggml.tokens", str)
    types = file.array("tokenizer.ggml.token_type", int, [1] * len(tokens))
    if len(types) != len(tokens) or not tokens:
        raise ModelLoadError(f"{file.path}: {len(tokens)} tokens have {len(types)} token types; one each expected")
    if model == "gpt2":
        backend = _byte_level_backend(file, tokens)
    elif model == "llama":
        backend = _sentencepiece_backend(file, tokens, types)
    else:
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.model is {model!r}; supported: 'gpt2', 'llama'")
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, types, strict=True)
         if kind in (_CONTROL, _UNKNOWN)]
    )
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token, kind in zip(tokens, types, strict=True)
         if kind == _USER_DEFINED]
    )
    special = _special_ids(file, len(tokens))
    _add_bos_and_eos(file, backend, tokens, special, sentencepiece=model == "llama")
    eos_ids = {special["eos_token"]} if "eos_token" in special else set()
    eos_ids |= {file.integer(key) for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
                if file.value(key) is not None}
    kinds = dict(zip(tokens, types, strict=True))
    eos_ids |= {backend.token_to_id(token) for token in _END_OF_TURN if kinds.get(token) == _CONTROL}
    return Tokenizer(
        backend,
        byte_level=model == "gpt2",
        bos_token_id=special.get("bos_token"),
        eos_token_ids=eos_ids,
        chat_template=file.string("tokenizer.chat_template", "") or None,
        special_tokens={name: tokens[token_id] for name, token_id in special.items()},
    )


def _special_ids(file: GgufFile, num_tokens: int) -> dict[str, int]:
    special = {}
    for name, key in _ID_KEYS.items():
        token_id = file.value(f"tokenizer.ggml.{key}")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
            raise ModelLoadError(
                f"{file.path}: tokenizer.ggml.{key} is {token_id!r:.40}; it must be between 0 and {num_tokens - 1}"
            )
        special[name] = token_id
    return special


def _vocabulary(file: GgufFile, tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelLoadError(f"{file.path}: {len(tokens) - len(vocabulary)} of {len(tokens)} tokens are duplicates")
    return vocabulary


def _byte_level_backend(file: GgufFile, tokens: Sequence[str]) -> Backend:
    pre = file.string("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(_SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.array("tokenizer.ggml.merges", str)]
    backend = Backend(_bpe(file, _vocabulary(file, tokens), merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _bpe(file: GgufFile, vocabulary: dict[str, int], merges: list, **options: object) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error


def _sentencepiece_backend(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> Backend:
    vocabulary = _vocabulary(file, tokens)
    if file.string("general.architecture").startswith("gemma"):
        # Gemma's merge order is the order of its tokens. Runs of spaces are stored as spaces.
        ranks: Sequence[float] = range(len(tokens))
    else:
        scores = file.array("tokenizer.ggml.scores", float)
        if len(scores) != len(tokens):
            raise ModelLoadError(f"{file.path}: {len(tokens)} tokens have {len(scores)} scores; one each expected")
        ranks = [-score for score in scores]
    unknown = tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else None
    merges = _merges_of(vocabulary, ranks)
    backend = Backend(_bpe(file, vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    escape = normalizers.Replace(" ", "\u2581")
    prefix = file.boolean("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), escape]) if prefix else escape
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of(vocabulary: dict[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """The merges behind a sentencepiece vocabulary: every way to make a token of two, best token first."""
    found = []
    id_of = vocabulary.get
    for token, token_id in vocabulary.items():
        for cut in range(1, len(token)):
            left_id = id_of(token[:cut])
            if left_id is None:
                continue
            right_id = id_of(token[cut:])
            if right_id is not None:
                found.append((ranks[token_id], left_id, right_id, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _add_bos_and_eos(
    file: GgufFile, backend: Backend, tokens: Sequence[str], special: dict[str, int], *, sentencepiece: bool
) -> None:
    """Let the backend put BOS before and EOS after a text where the file, or llama.cpp's default, says so."""
    bos_default = sentencepiece or file.value("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    parts, used = ["$A"], []
    if file.boolean("tokenizer.ggml.add_bos_token", bos_default) and "bos_token" in special:
        used.append(special["bos_token"])
        parts.insert(0, tokens[used[-1]])
    if file.boolean("tokenizer.ggml.add_eos_token", False) and "eos_token" in special:
        used.append(special["eos_token"])
        parts.append(tokens[used[-1]])
    if used:
        backend.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=[(tokens[token_id], token_id) for token_id in used]
        )
