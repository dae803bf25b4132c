"""Constrained outputs: always valid, and nobody else's tokens change."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tilestream.constraint import Constraint
from tilestream.engine import constraints
from tilestream.engine.constraints import ConstraintError, GrammarCompiler, Matcher
from tilestream.engine.engine import Engine
from tilestream.engine.request import RequestDelta
from tilestream.sampling_params import SamplingParams

from .fakes import run_all, text_of, tokens_of
from .random_model import EOS, NO_TOKEN, SPECIAL, VOCAB_SIZE, JsonTokenizer, make_engine

PROMPT = list(range(40, 90))
OBJECT = Constraint.json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "ages": {"type": "array", "items": {"type": "integer"}}},
        "required": ["name", "ages"],
        "additionalProperties": False,
    }
)


def run(engine: Engine, params: Sequence[SamplingParams], prompts: Sequence[list[int]] = ()) -> list[list[RequestDelta]]:
    for i, each in enumerate(params):
        engine.add_request(str(i), prompts[i] if prompts else PROMPT, each)
    deltas = run_all(engine)
    return [deltas[str(i)] for i in range(len(params))]


def one(constraint: Constraint, engine: Engine | None = None, **fields: object) -> list[RequestDelta]:
    params = SamplingParams(constraint=constraint, **({"max_tokens": 600, "seed": 1} | fields))
    return run(engine or make_engine(), [params])[0]


_NAMES = st.text("abcxyz_ü", min_size=1, max_size=4)
_INTEGERS = st.integers(-(2**53), 2**53)
_LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-200, 200), st.integers(0, 90)
    ),
    st.builds(lambda high: {"type": "number", "exclusiveMaximum": high}, st.integers(-5, 5)),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size}, st.integers(0, 3), st.integers(0, 8)
    ),
    st.just({"type": "string", "pattern": "^[a-c]{2,5}$"}),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(_INTEGERS, _NAMES, st.none()), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, st.one_of(_NAMES, _INTEGERS, st.booleans())),
)


def _object(properties: dict, num_required: int) -> dict:
    required = list(properties)[:num_required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(_NAMES, inner, min_size=1, max_size=4), st.integers(0, 4)),
        st.builds(
            lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
            inner, st.integers(0, 2), st.integers(0, 3),
        ),
        st.builds(lambda members: {"anyOf": members}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_answers_are_valid_under_any_schema(schema: dict, seed: int) -> None:
    constraint = Constraint.json_schema(schema)
    answers = run(make_engine(), [SamplingParams(max_tokens=700, seed=seed + i, constraint=constraint) for i in range(3)])
    for deltas in answers:
        assert deltas[-1].finish_reason == "stop", deltas[-1]
        jsonschema.validate(json.loads(text_of(deltas)), schema)


@pytest.mark.parametrize(
    ("constraint", "is_valid"),
    [
        (Constraint.json_object(), lambda text: isinstance(json.loads(text), dict)),
        (Constraint.regex(r"[a-f]{3,9}-\d\d"), re.compile(r"[a-f]{3,9}-\d\d").fullmatch),
        (Constraint.choice(["yes", 'no "quotes"', "ünïcode\n", "<special>"]), ["yes", 'no "quotes"', "ünïcode\n", "<special>"].__contains__),
        (Constraint.grammar('start: "a" start "b" | "c"'), re.compile("a*cb*").fullmatch),
        (Constraint.grammar('root ::= "x" item*\nitem ::= "<" [0-9] ">"'), re.compile(r"x(<\d>)*").fullmatch),
    ],
    ids=["json_object", "regex", "choice", "lark", "gbnf"],
)  # fmt: skip
def test_kinds(constraint: Constraint, is_valid) -> None:
    engine = make_engine()
    for deltas in run(engine, [SamplingParams(max_tokens=600, seed=seed, constraint=constraint) for seed in range(6)]):
        assert deltas[-1].finish_reason == "stop"
        assert is_valid(text_of(deltas)), text_of(deltas)
        assert not {SPECIAL, NO_TOKEN} & set(tokens_of(deltas))


def test_the_end_comes_only_when_the_grammar_allows_it() -> None:
    """Every token is forced or an end, and the model would take an end at any time."""
    eager = {EOS[0]: 100.0}
    assert text_of(one(Constraint.regex("abc"), logit_bias=eager)) == "abc"
    deltas = one(Constraint.regex("a(bc)*"), logit_bias=eager)
    assert text_of(deltas) == "a" and tokens_of(deltas)[-1] == EOS[0]
    deltas = one(Constraint.regex("a(bc)*"), logit_bias=eager, min_tokens=4)
    assert text_of(deltas) == "abcbc"[: len(tokens_of(deltas)) - 1] and len(tokens_of(deltas)) >= 5
    deltas = one(Constraint.regex("ab"), ignore_eos=True)
    assert text_of(deltas) == "ab" and deltas[-1].finish_reason == "stop"


def test_max_tokens_inside_json_is_length() -> None:
    deltas = one(OBJECT, max_tokens=5)
    assert deltas[-1].finish_reason == "length" and len(tokens_of(deltas)) == 5
    with pytest.raises(json.JSONDecodeError):
        json.loads(text_of(deltas))


def test_the_others_get_the_same_bits() -> None:
    free = [SamplingParams(max_tokens=40, seed=seed, temperature=t, logprobs=2) for seed, t in enumerate((0, 1, 1, 0.5))]
    bound = [SamplingParams(max_tokens=40, seed=9, constraint=OBJECT), SamplingParams(max_tokens=40, seed=9, logit_bias={5: 50})]
    alone = run(make_engine(), free)
    mixed = run(make_engine(), [bound[0], *free, bound[1]])[1:-1]
    assert [tokens_of(deltas) for deltas in mixed] == [tokens_of(deltas) for deltas in alone]
    assert [[d.logprobs for d in deltas] for deltas in mixed] == [[d.logprobs for d in deltas] for deltas in alone]


def test_preemption_and_chunks_change_nothing() -> None:
    params = [SamplingParams(max_tokens=90, seed=seed, constraint=OBJECT, logprobs=1) for seed in range(8)]
    prompts = [[40 + i] * (20 + 9 * i) for i in range(8)]
    calm = run(make_engine(token_budget=512), params, prompts)
    engine = make_engine(kv_cache_tokens=16 * 16, max_model_len=250, token_budget=24, enable_prefix_caching=False)
    pressed = run(engine, params, prompts)
    assert engine.scheduler.num_preemptions > 0
    assert [tokens_of(deltas) for deltas in pressed] == [tokens_of(deltas) for deltas in calm]
    assert [[d.logprobs for d in deltas] for deltas in pressed] == [[d.logprobs for d in deltas] for deltas in calm]


def test_a_runner_that_overlaps_waits_for_the_token() -> None:
    params = [SamplingParams(max_tokens=90, seed=seed, constraint=OBJECT if seed % 2 else None) for seed in range(6)]
    expected = [tokens_of(deltas) for deltas in run(make_engine(), params)]
    engine = make_engine()
    engine.runner.overlaps = True
    assert [tokens_of(deltas) for deltas in run(engine, params)] == expected


def test_logprobs_are_the_models_own() -> None:
    """A forced token has the probability that the model gave it, not 1."""
    engine = make_engine()
    deltas = one(Constraint.regex("zq"), engine, logprobs=3)
    previous = [PROMPT[-1], ord("z")]
    for i, delta in enumerate(deltas):
        (entry,) = delta.logprobs
        logits = engine.runner.model.logits(previous[i], len(PROMPT) - 1 + i).log_softmax(-1)
        assert entry.logprob == pytest.approx(float(logits[entry.token_id]), abs=1e-5)
        assert [token for token, _ in entry.top] == logits.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint.regex("(a"), "the regex cannot be compiled: .*unclosed group"),
        (Constraint.json_schema({"type": "frob"}), "the json_schema cannot be compiled: Invalid type: frob"),
        (Constraint.json_schema("[]"), "the json_schema cannot be compiled: "),
        (Constraint.json_schema({"const": "x" * 200_000}), "has 200013 characters; at most 131072 are allowed"),
        (Constraint.json_schema({"const": 2**53 + 1}), "exact up to 9007199254740992, and it has 9007199254740993"),
        (Constraint.json_schema({"minimum": -(10**60 - 1)}), "and it has -9999"),
        (Constraint.regex("x" * 20_000), "the regex has 20000 characters; at most 16384"),
        (
            Constraint.json_schema({"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3500)}}),
            "has 3500 references; at most 1000",
        ),
        (Constraint.grammar("start: a0\n" + "".join(f"a{i}:a{i + 1}\n" for i in range(1400))), "has 1401 rules; at most 1000"),
        (Constraint.json_schema({"uniqueItems": True, "type": "array"}), "uniqueItems"),
        (Constraint.json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable"),
        (Constraint.grammar("start: nothing"), "the grammar cannot be compiled: .*nothing"),
        (Constraint.grammar("root ::= ("), "the grammar cannot be compiled: Failed to convert"),
    ],
)
def test_what_cannot_be_compiled_is_refused(constraint: Constraint, words: str) -> None:
    engine = make_engine()
    with pytest.raises(ConstraintError, match=words):
        engine.add_request("x", PROMPT, SamplingParams(constraint=constraint))
    assert not engine.has_work()


def test_a_grammar_that_grows_too_large_ends_its_request_only() -> None:
    huge = SamplingParams(constraint=Constraint.regex("(a{1000}){1000}"), max_tokens=50)
    failed, fine = run(make_engine(), [huge, SamplingParams(constraint=Constraint.regex("abc"))])
    assert failed[-1].finish_reason == "error" and "the constraint cannot be followed: " in failed[-1].error
    assert failed[-1].stop_reason == "constraint"
    assert text_of(fine) == "abc"


def test_a_matcher_that_breaks_ends_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add_request("broken", PROMPT, SamplingParams(constraint=OBJECT))
    engine.add_request("fine", PROMPT, SamplingParams(constraint=Constraint.regex("abc")))
    broken = engine._requests["broken"].matcher
    fill = Matcher.fill_allowed
    monkeypatch.setattr(Matcher, "fill_allowed", lambda m, *where: 1 / 0 if m is broken else fill(m, *where))
    deltas = run_all(engine)
    assert deltas["broken"][-1].finish_reason == "error" and text_of(deltas["fine"]) == "abc"


def test_grammars_are_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_MAX_CACHED_GRAMMARS", 2)
    compiler, compiled = GrammarCompiler(JsonTokenizer(), VOCAB_SIZE), []
    compile = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda constraint: compiled.append(constraint.text) or compile(constraint))
    for text in "abacab":
        compiler.matcher(Constraint.regex(text)).accept(ord(text))  # each matcher begins anew
    assert compiled == ["a", "b", "c", "b"]


def test_without_llguidance_only_constraints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = make_engine()
    with pytest.raises(ConstraintError, match="constraints need the package llguidance"):
        engine.add_request("x", PROMPT, SamplingParams(constraint=OBJECT))
    assert len(tokens_of(run(engine, [SamplingParams(max_tokens=4, ignore_eos=True)])[0])) == 4


def test_a_model_without_an_end() -> None:
    tokenizer = JsonTokenizer()
    tokenizer.eos_token_ids = frozenset()
    with pytest.raises(ConstraintError, match="this model has none"):
        GrammarCompiler(tokenizer, VOCAB_SIZE).matcher(Constraint.regex("a"))


@pytest.mark.parametrize(
    ("schema", "words"), [("{", "is no valid JSON: "), ('{"a":' * 100_000, "nested too deeply"), ("", "is no valid JSON")]
)
def test_schemas_are_json(schema: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Constraint.json_schema(schema)


def test_long_chains_of_references_do_not_overflow_the_stack() -> None:
    compiler = GrammarCompiler(JsonTokenizer(), VOCAB_SIZE)
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(998)} | {"a998": {"type": "integer"}}
    constraints = [
        Constraint.json_schema({"$defs": chain, "$ref": "#/$defs/a0"}),
        Constraint.grammar("start:a0\n" + "".join(f"a{i}:a{i + 1}\n" for i in range(998)) + 'a998:"x"'),
    ]
    with ThreadPoolExecutor(1) as pool:  # threads may have smaller stacks
        assert all(pool.map(compiler.matcher, constraints))


@pytest.mark.parametrize("choices", ["yes", [1], [], ["a", ""]])
def test_choices_are_strings(choices: object) -> None:
    with pytest.raises((TypeError, ValueError), match="choice must be a list of"):
        Constraint.choice(choices)
