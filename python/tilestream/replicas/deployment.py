"""The Ray Serve application: an ingress that reads a request's prefix, and replicas of the whole server behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError as error:
    text = f"--replicas needs Ray Serve, which is not installed: pip install 'tilestream[ray]' ({error})"
    raise ImportError(text) from None
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from tilestream.replicas.affinity import in_order, prefix_key
from tilestream.replicas.metrics import merge_metrics
from tilestream.server.run import bind
from tilestream.server.settings import ServerSettings

_APPLICATION = "tilestream"
_HEALTH_S = 2  # between two looks at a replica; one that has failed is started anew
_POLL_S = 0.2  # between two looks at whether all answers have ended
_METRICS_S = 5  # that replicas have to show theirs
_NO_LIMIT = 1 << 20
_OBJECTS_BYTES = 200 << 20  # of Ray's store on a machine of our own: requests and answers are small
_FORWARDED = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """One replica.

    Args:
        llm: what LLM takes.
        model_name: that requests ask for; None: the model's own.
        settings: of its server.
    """

    llm: dict[str, Any]
    model_name: str | None
    settings: ServerSettings


class Replica:
    """A model, its engine and the server's application, in a process that Ray has started."""

    def __init__(self, options: ReplicaOptions) -> None:
        from tilestream import LLM
        from tilestream.server.app import create_app

        self._llm = LLM(**options.llm)
        self._engine = self._llm.async_engine
        self._app = create_app(
            self._engine, self._llm.tokenizer, model_name=options.model_name or self._llm.name,
            max_model_len=self._llm.engine.config.max_model_len, settings=options.settings,
        )  # fmt: skip

    async def answer(self, key: bytes | None, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """What the application answers, as ASGI messages. Who stops reading ends the request.

        Args:
            key: that it was routed by.
            scope, body: of the request.
        """
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        rest = asyncio.Event()
        received = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in received:
                return message
            await rest.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            messages.put_nowait(message)

        task = asyncio.ensure_future(self._app(scope | {"state": {}}, receive, send))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            task.result()
        finally:
            rest.set()
            task.cancel()

    async def metrics(self, scope: dict[str, Any]) -> tuple[str, str]:
        """This replica's name and its page of metrics.

        Args:
            scope: of a request for it.
        """
        parts = [message.get("body", b"") async for message in self.answer(None, scope, b"")]
        return serve.get_replica_context().replica_id.unique_id, b"".join(parts).decode()

    def check_health(self) -> None:
        """Ray asks this now and then."""
        if self._engine.failure is not None:
            raise self._engine.failure

    def __del__(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.close()


class PrefixRouter(RequestRouter):
    """Ray's question to tilestream.replicas.affinity."""

    # A replica is asked how much it has to do before it is chosen. A busy machine's answer is worth waiting for, as another
    # replica would have to compute the prefix.
    queue_len_response_deadline_s = 1.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        key = pending_request.args[0] if pending_request is not None and pending_request.args else None
        return [[replicas[name]] for name in in_order(key, loads)]


class Ingress:
    """Takes every request, and passes it on; shows the metrics of all replicas.

    Args:
        replicas: a handle to them.
        max_body_bytes: of a request; of a longer one the rest is not read.
    """

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:  # the replica refuses it
                break
        body = bytes(body)
        scope = {name: request.scope[name] for name in _FORWARDED if name in request.scope}
        if request.method == "GET" and request.url.path == "/metrics":
            return await self._metrics(scope)
        messages = self._replicas.answer.remote(prefix_key(body), scope, body)
        start = await anext(messages)

        async def rest() -> AsyncIterator[bytes]:
            async for message in messages:
                yield message.get("body", b"")

        response = StreamingResponse(rest(), status_code=start["status"])
        response.raw_headers = [(name, value) for name, value in start["headers"] if name != b"x-request-id"]  # Ray adds it
        return response

    async def _metrics(self, scope: dict[str, Any]) -> Response:
        try:
            found = await self._replicas.broadcast("metrics", scope).results_async(timeout_s=_METRICS_S, return_exceptions=True)
        except TimeoutError:
            return PlainTextResponse(f"not every replica has shown its metrics within {_METRICS_S} s\n", 503)
        pages = dict(page for page in found if not isinstance(page, BaseException))  # others are being started anew
        return Response(merge_metrics(pages), media_type=CONTENT_TYPE_LATEST)


def serve_replicas(options: ReplicaOptions, num_replicas: int, *, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM; then running answers may end, unless a second one comes.

    Uses the Ray cluster that RAY_ADDRESS names, and the Serve that may run there, or a cluster of its own on this machine.

    Args:
        options: of each replica.
        num_replicas: how many.
        host, port: where to listen; on every machine of the cluster that has a replica. 0: any port that is free here.
    Raises:
        OSError: the address is not ours, or the port is taken.
        ValueError: the cluster serves Tilestream already.
    """
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: next to nothing on a busy machine
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECTS_BYTES)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own prints where it was
    try:
        found = serve.status()
        if _APPLICATION in found.applications:
            raise ValueError(f"The Ray cluster has a Serve application {_APPLICATION!r} already; stop that one first.")
        if found.proxies:
            where = "where the cluster's Serve listens, which runs already: --host and --port do not count"
        else:
            with bind(host, port) as listener:  # a taken port is told now, in our words
                host, port = listener.getsockname()[:2]
            serve.start(http_options={"host": host, "port": port})
            where = f"http://{host}:{port}/v1"
        try:
            serve.run(_application(options, num_replicas), name=_APPLICATION)
        except BaseException:  # a cluster of others does not keep what failed
            if found.proxies:
                serve.delete(_APPLICATION, _blocking=False)
            else:
                serve.shutdown()
            raise
        print(f"Ready: {where}, {num_replicas} replicas (Ctrl-C stops)", file=sys.stderr, flush=True)
        _until_stopped()
        if not found.proxies and not serve.status().applications:  # others' may have come, or a second signal
            serve.shutdown()
    finally:
        ray.shutdown()


def _until_stopped() -> None:
    """Until a stop signal has come and all answers have ended, or a second one has come."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    stop.clear()
    serve.delete(_APPLICATION, _blocking=False)  # blocking it gives up after a minute
    while _APPLICATION in serve.status().applications and not stop.wait(_POLL_S):
        pass


def _application(options: ReplicaOptions, num_replicas: int) -> serve.Application:
    num_ranks, num_threads = options.llm["tensor_parallel_size"], options.llm["num_threads"]
    if options.llm["device"] == "cpu":
        if num_threads is None:
            num_threads = max(1, int(ray.cluster_resources()["CPU"]) // num_replicas // num_ranks)
        resources = {"num_cpus": num_threads * num_ranks}
    else:
        resources = {"num_cpus": 1, "num_gpus": num_ranks}
    options = ReplicaOptions(
        llm=options.llm | {"num_threads": num_threads}, model_name=options.model_name, settings=options.settings
    )
    replicas = serve.deployment(
        Replica,
        num_replicas=num_replicas,
        # The replica's own queue says what is too much, and how long to wait.
        max_ongoing_requests=options.llm["max_num_seqs"] + options.llm["max_queued_requests"] + 1,
        ray_actor_options=resources,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=options.settings.drain_timeout_s,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )
    ingress = serve.deployment(
        Ingress,
        max_ongoing_requests=_NO_LIMIT,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.settings.drain_timeout_s,
    )
    return ingress.bind(replicas.bind(options), options.settings.max_body_bytes)
