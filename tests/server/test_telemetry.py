"""OpenTelemetry spans, as a collector receives them, and Prometheus metrics of a real engine."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tilestream.server.telemetry import TelemetryMissingError, open_telemetry

from .hosts import MODEL, make_engine, served

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector:
    """Takes spans on a port of this machine."""

    def __init__(self) -> None:
        self.spans = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def facts(span) -> dict[str, object]:
    values = {a.key: a.value for a in span.attributes}
    return {
        key: [v.string_value for v in value.array_value.values] if value.HasField("array_value")
        else getattr(value, value.WhichOneof("value"))
        for key, value in values.items()
    }  # fmt: skip


def test_spans_reach_a_collector(collector: Collector) -> None:
    with served(make_engine()) as url:
        fields = {"max_tokens": 6, "ignore_eos": True, "temperature": 0.5}
        body = {"prompt": "my secret", "n": 2} | fields
        headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "X-Request-Id": "abc"}
        httpx.post(f"{url}/v1/completions", json=body, headers=headers).raise_for_status()
        chat = {"messages": [{"role": "user", "content": "my secret"}], "stream": True, "max_completion_tokens": 4} | fields
        httpx.post(f"{url}/v1/chat/completions", json=chat).raise_for_status()
        assert httpx.post(f"{url}/v1/completions", json={"prompt": ""}).status_code == 400
        httpx.get(f"{url}/health")
    completion, talk = collector.spans  # the end of the server has sent them; others than generations have none
    assert completion.name == f"text_completion {MODEL}" and talk.name == f"chat {MODEL}"
    assert completion.trace_id.hex() == TRACE_ID != talk.trace_id.hex()
    assert completion.start_time_unix_nano < completion.end_time_unix_nano
    values = facts(completion)
    assert values.pop("gen_ai.response.id").startswith("cmpl-")
    assert 0 <= values.pop("tilestream.queue_time_s") <= values.pop("tilestream.time_to_first_token_s") < 10
    assert values == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tilestream",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "tilestream.request_id": "abc",
    }
    assert facts(talk)["gen_ai.operation.name"] == "chat" and facts(talk)["gen_ai.request.max_tokens"] == 4
    assert "secret" not in str(collector.spans)


def test_a_collector_that_is_gone_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with served(make_engine()) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_off_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert open_telemetry(MODEL) is None


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TelemetryMissingError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*tilestream\[otel\]"):
        open_telemetry(MODEL)


def test_prometheus_metrics_of_a_real_engine() -> None:
    engine = make_engine(token_budget=64)
    with served(engine) as url:
        body = {"prompt": "x" * 200, "max_tokens": 5, "ignore_eos": True}
        for _ in range(2):  # the second one's prompt is cached but for its last page
            httpx.post(f"{url}/v1/completions", json=body).raise_for_status()
        text = httpx.get(f"{url}/metrics").text
    values = {
        re.sub(r"model_name=\"[^\"]*\",?", "", name).replace(",}", "}").replace("{}", ""): float(value)
        for name, value in re.findall(r"^tilestream:(\S+) (\S+)$", text, re.MULTILINE)
    }
    now = engine.metrics
    assert values["step_prefill_tokens_total"] == now.prefill_tokens == 200 + 200 - 192
    assert values["step_decode_tokens_total"] == 8 and values["token_budget"] == 64
    assert values["step_budget_tokens_total"] == 64 * now.num_steps
    assert values["prefix_cache_queries_total"] == 400 and values["prefix_cache_hits_total"] == 192
    assert values["iteration_tokens_total_sum"] == now.step_tokens
    assert values["iteration_tokens_total_count"] == values['iteration_tokens_total_bucket{le="+Inf"}'] == now.num_steps
    assert values['iteration_tokens_total_bucket{le="1.0"}'] == 8 <= values['iteration_tokens_total_bucket{le="64.0"}']
    assert values["request_time_per_output_token_seconds_count"] == 2 == values["request_queue_time_seconds_count"]
    assert values["inter_token_latency_seconds_count"] == 8
    assert values['request_success_total{finished_reason="length"}'] == 2
    parts = [values[f'step_seconds_total{{part="{part}"}}'] for part in ("schedule", "runner", "output")]
    assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(now.step_time_s)
    assert "process_resident_memory_bytes" in text
