"""OpenTelemetry: a span for every generation, named as the semantic conventions for generative AI name things.

On when OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set; needs the extra `tilestream[otel]`.
Prompts and answers are never exported.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from starlette.types import Scope

    from tilestream.server.context import RequestContext

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_REQUEST_FIELDS = ("temperature", "top_p", "top_k", "max_tokens", "frequency_penalty", "presence_penalty", "seed")


class TelemetryMissingError(ImportError):
    """Spans are asked for, and OpenTelemetry is not installed."""


def open_telemetry(model_name: str) -> Telemetry | None:
    """Spans go where the environment says; None where it says nothing."""
    exporter = exporter_class()
    return None if exporter is None else Telemetry(model_name, exporter())


def exporter_class() -> type[SpanExporter] | None:
    """What sends spans, if they are asked for.

    Raises:
        TelemetryMissingError: it names an endpoint, and the extra is missing.
    """
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise TelemetryMissingError(
            f"{endpoint} is set, but OpenTelemetry is not installed: pip install 'tilestream[otel]', or unset it"
        ) from None
    return OTLPSpanExporter


class Telemetry:
    """Makes spans, and gives them to an exporter in the background."""

    def __init__(self, model_name: str, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "tilestream")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=True)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tilestream.server")
        self._model_name = model_name

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()

    def export(self, scope: Scope, context: RequestContext, status: int, seconds: float) -> None:
        """The span of a generation that has ended just now, in the trace of the caller if it sent a traceparent."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end_ns = time.time_ns()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = self._attributes(scope, context, status)
        span = self._tracer.start_span(
            f"{attributes['gen_ai.operation.name']} {self._model_name}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            start_time=end_ns - int(1e9 * seconds),
            attributes=attributes,
        )
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def _attributes(self, scope: Scope, context: RequestContext, status: int) -> dict[str, Any]:
        usage = context.answer.usage()
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat" if scope["path"].endswith("/chat/completions") else "text_completion",
            "gen_ai.provider.name": "tilestream",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": context.answer.answer_id,
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "http.request.method": scope["method"],
            "http.response.status_code": status,
            "url.path": scope["path"],
            "tilestream.request_id": context.request_id,
        }
        for name in _REQUEST_FIELDS:
            if (value := getattr(context.body, name, None)) is not None:
                attributes[f"gen_ai.request.{name}"] = value
        if (most := getattr(context.body, "max_completion_tokens", None)) is not None:  # the newer word for it
            attributes["gen_ai.request.max_tokens"] = most
        if (num_choices := getattr(context.body, "n", None) or 1) > 1:
            attributes["gen_ai.request.choice.count"] = num_choices
        if context.last_deltas:
            attributes["gen_ai.response.finish_reasons"] = [str(d.finish_reason) for d in context.last_deltas]
            last = context.last_deltas[-1]
            if last.first_scheduled_s is not None and last.arrival_s is not None:
                attributes["tilestream.queue_time_s"] = last.first_scheduled_s - last.arrival_s
            if last.first_token_s is not None and last.arrival_s is not None:
                attributes["tilestream.time_to_first_token_s"] = last.first_token_s - last.arrival_s
        return attributes
