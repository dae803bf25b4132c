"""One page for all replicas."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tilestream.replicas.metrics import merge_metrics


def page(num_requests: int) -> str:
    registry = CollectorRegistry()
    Counter("requests", "So far.", ["reason"], registry=registry).labels("stop").inc(num_requests)
    Gauge("running", "Now.", registry=registry).set(num_requests / 2)
    Histogram("seconds", "Each.", buckets=(1.0, 2.0), registry=registry).observe(num_requests)
    return generate_latest(registry).decode()


def test_every_sample_says_whose_it_is() -> None:
    merged = merge_metrics({"a": page(3), "b": page(1)}).decode()
    assert merged.count("# TYPE requests_total counter") == merged.count("# TYPE seconds histogram") == 1
    values = {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(merged) for s in f.samples}
    assert values["requests_total", "stop", "a"] == 3 and values["requests_total", "stop", "b"] == 1
    assert values["running", "a"] == 1.5 and values["running", "b"] == 0.5
    assert values["seconds_bucket", "2.0", "a"] == 0 and values["seconds_bucket", "2.0", "b"] == 1


def test_no_replica_no_samples() -> None:
    assert merge_metrics({}) == b""
