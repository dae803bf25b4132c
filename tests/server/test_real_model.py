"""What only a real model shows, through the real `openai` client: SmolLM2 behind uvicorn in this process."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pydantic
import pytest
import uvicorn
from tilestream import LLM, Constraint, SamplingParams
from tilestream.server.app import create_app

QUESTION = [{"role": "user", "content": "Name a large city and how many people live there."}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}, "people": {"type": "integer", "minimum": 0, "maximum": 10**8}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": CITY}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_cache_tokens=8192, batch_invariant=True, seed=0)


@pytest.fixture(scope="module")
def reference() -> LLM:
    """The same model, for answers without a server."""
    return LLM(kv_cache_tokens=8192, batch_invariant=True)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[openai.OpenAI]:
    app = create_app(llm.async_engine, llm.tokenizer, model_name=llm.name, max_model_len=llm.engine.config.max_model_len)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", api_key="unused", max_retries=0)
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def chat(client: openai.OpenAI, llm: LLM):
    def create(**fields: object):
        return client.chat.completions.create(
            **({"model": llm.name, "messages": QUESTION, "max_tokens": 100, "seed": 3} | fields)
        )

    return create


@pytest.fixture
def complete(client: openai.OpenAI, llm: LLM):
    def create(**fields: object):
        return client.completions.create(**({"model": llm.name, "max_tokens": 20, "seed": 3} | fields))

    return create


def test_json_schema(chat) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    answer = chat(response_format=form, n=4, temperature=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), CITY)
    assert len({choice.message.content for choice in answer.choices}) > 1
    stream = chat(response_format=form, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_parse_into_a_model(client: openai.OpenAI, llm: LLM) -> None:
    class City(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=30)
        people: int = pydantic.Field(ge=0, le=10**8)

    fields = {"model": llm.name, "messages": QUESTION, "max_tokens": 100, "seed": 1, "temperature": 1}
    parsed = client.chat.completions.parse(**fields, response_format=City).choices[0].message.parsed
    assert isinstance(parsed, City)


def test_cut_json_is_length(chat) -> None:
    (choice,) = chat(extra_body={"guided_json": CITY}, max_tokens=4).choices
    assert choice.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice.message.content)


def test_vllms_fields(chat, complete) -> None:
    assert chat(extra_body={"guided_choice": ["Paris", "Rome"]}).choices[0].message.content in ("Paris", "Rome")
    text = complete(prompt="A date: ", extra_body={"guided_regex": r"\d{4}-\d\d-\d\d"}).choices[0].text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)
    grammar = 'root ::= "[" [0-9]+ ("," [0-9]+)? "]"'
    text = complete(prompt="[", extra_body={"structured_outputs": {"grammar": grammar}}, max_tokens=60).choices[0].text
    assert re.fullmatch(r"\[\d+(,\d+)?\]", text)
    with pytest.raises(openai.BadRequestError, match="unclosed group") as error:
        complete(prompt="x", extra_body={"guided_regex": "(a"})
    assert error.value.param == "guided_regex"


def test_company_changes_no_token(llm: LLM, reference: LLM, client: openai.OpenAI, complete) -> None:
    """Free requests beside constrained, biased and scored ones: the same tokens and logprobs, bit for bit."""
    prompts = ["Once upon a time", "The capital of France is", "def main():"]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=7, logprobs=1)
    alone = [reference.generate(prompt, params)[0] for prompt in prompts]
    odd = [
        SamplingParams(max_tokens=40, seed=1, constraint=Constraint.json_schema(CITY)),
        SamplingParams(max_tokens=9, seed=1, logit_bias={100: 50.0}, prompt_logprobs=2),
        SamplingParams(max_tokens=9, seed=1, min_tokens=9),
    ]
    mixed = reference.generate(["JSON:", "A long prompt to score. " * 9, "Hi", *prompts], [*odd, params, params, params])[3:]
    assert [output.token_ids for output in mixed] == [output.token_ids for output in alone]
    assert [output.logprobs for output in mixed] == [output.logprobs for output in alone]


def test_preemption_keeps_constraints(reference: LLM) -> None:
    cities = {"type": "array", "items": CITY, "minItems": 2, "maxItems": 3}
    params = [SamplingParams(max_tokens=220, seed=seed, constraint=Constraint.json_schema(cities)) for seed in range(6)]
    prompts = [f"{i}. Cities as JSON: " * (2 + i) for i in range(6)]
    small = LLM(kv_cache_tokens=320, page_size=16, max_model_len=320, batch_invariant=True, token_budget=64)
    pressed = small.generate(prompts, params)
    assert small.engine.metrics.num_preemptions > 0
    assert [output.token_ids for output in pressed] == [output.token_ids for output in reference.generate(prompts, params)]
    for output in pressed:
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), cities)


@pytest.mark.parametrize("stream", [False, True])
def test_forced_tool_calls_work_with_any_template(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    fields = {"model": llm.name, "messages": QUESTION, "tools": [TOOL], "max_tokens": 200, "seed": 5}
    for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
        more = fields | {"tool_choice": choice, "parallel_tool_calls": False}
        if stream:
            with client.chat.completions.stream(**more) as events:
                answer = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**more)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "look_up"
        jsonschema.validate(json.loads(call.function.arguments), CITY)
    with pytest.raises(openai.BadRequestError, match="teaches no tool calls"):
        client.chat.completions.create(**fields)


def test_echo_scores_the_prompt(complete, reference: LLM) -> None:
    prompt = "The capital of France is Paris, and the capital of Italy is Rome."
    (choice,) = complete(prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices
    assert choice.text == prompt
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == prompt and logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    # What the model finds likely when it is asked token by token.
    ids = reference.tokenizer.encode(prompt)
    for i in (1, 5, len(ids) - 1):
        step = reference.generate([ids[:i]], SamplingParams(max_tokens=1, logprobs=0, logit_bias={ids[i]: 100}, temperature=0))[0]
        assert step.token_ids == [ids[i]]
        assert logprobs.token_logprobs[i] == pytest.approx(step.logprobs[0].logprob, abs=1e-4)
    longer = complete(prompt=prompt, echo=True, logprobs=0, max_tokens=5, temperature=0).choices[0]
    assert longer.logprobs.token_logprobs[1:len(ids)] == pytest.approx(logprobs.token_logprobs[1:], abs=1e-4)
    assert longer.text.startswith(prompt) and len(longer.logprobs.tokens) == len(ids) + 5


def test_best_of(complete) -> None:
    fields = {"prompt": "My favourite", "logprobs": 0, "temperature": 1.2}
    everything = complete(**fields, n=4).choices
    means = {choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in everything}
    best = complete(**fields, n=2, best_of=4).choices
    assert [choice.text for choice in best] == sorted(means, key=means.get, reverse=True)[:2]


def test_logit_bias(complete, reference: LLM) -> None:
    (paris,) = reference.tokenizer.encode(" Paris")
    (cat,) = reference.tokenizer.encode(" cat")
    fields = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 3}
    assert "Paris" in complete(**fields).choices[0].text
    assert "Paris" not in complete(**fields, logit_bias={str(paris): -100}).choices[0].text
    assert complete(**fields, logit_bias={str(cat): 100}).choices[0].text == " cat cat cat"
    with pytest.raises(openai.BadRequestError, match="logit_bias names token 49152") as error:
        complete(**fields, logit_bias={"49152": 1})
    assert error.value.param == "logit_bias"


def test_min_tokens(chat) -> None:
    short = chat(messages=[{"role": "user", "content": "Say only: yes"}], temperature=0)
    least = short.usage.completion_tokens + 5
    longer = chat(messages=[{"role": "user", "content": "Say only: yes"}], temperature=0, extra_body={"min_tokens": least})
    assert short.choices[0].finish_reason == "stop" and longer.usage.completion_tokens >= least


def test_the_documented_call(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/api.md's call of the server, as it stands there but for the port."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code.replace("http://127.0.0.1:8000/v1", str(client.base_url)), "docs/api.md", "exec"), {})
    assert json.loads(capsys.readouterr().out).keys() == {"city", "country"}
