"""HTTPS, CORS, request ids, logs as JSON, spans and metrics, seen from outside."""

import gzip
import json
import re
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx2
import pytest

from tokenry.api.tls import tls_options
from tokenry.config import ServerConfig, load
from tokenry.errors import ConfigError

BODY = {"prompt": "Once upon", "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", cert]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_https_serves_and_its_certificate_is_the_one_given(start_toy, certificate):
    cert, key = certificate
    server = start_toy({"ssl_certfile": cert, "ssl_keyfile": key})
    assert server.url.startswith("https://")
    trusting = httpx2.Client(
        base_url=server.url, verify=ssl.create_default_context(cafile=cert), timeout=60
    )
    server.http.close()
    server.http = trusting
    server.wait_ready()
    answer = trusting.post("/v1/completions", json={**BODY, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert server.close() == 0


@pytest.mark.parametrize("which", ["absent", "swapped", "alone"])
def test_a_certificate_that_cannot_serve_is_refused_before_anything_is_loaded(certificate, which):
    cert, key = certificate
    given = {
        "absent": {"ssl_certfile": cert, "ssl_keyfile": "/nowhere/key.pem"},
        "swapped": {"ssl_certfile": key, "ssl_keyfile": cert},
        "alone": {"ssl_certfile": cert},
    }[which]
    with pytest.raises(ConfigError) as caught:
        tls_options(load(ServerConfig, given, environ={}))
    assert "ssl-keyfile" in str(caught.value) or "certificate" in str(caught.value)


def test_pages_of_named_origins_may_use_the_api_and_others_may_not(start_toy):
    options = {"cors_origins": ["https://chat.example"], "api_key": ["k"]}
    server = start_toy(options).wait_ready()
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    allowed = server.http.options("/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    other = server.http.options(
        "/v1/chat/completions", headers={**asked, "origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    # an error must be readable for the page, too
    refused = server.http.get("/v1/models", headers={"origin": "https://chat.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    server.close()


def test_without_the_option_no_origin_is_told(toy):
    answer = toy.http.get("/version", headers={"origin": "https://chat.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_json_log_is_one_object_per_line_and_holds_no_prompt(start_toy):
    server = start_toy({"log_format": "json"}).wait_ready()
    headers = {"x-request-id": "my-own-id"}
    body = {**BODY, "prompt": "A secret tale"}
    answer = server.http.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "my-own-id"
    lines = [json.loads(line) for line in server.end()]
    assert {"time", "level", "logger"} <= set.intersection(*(set(line) for line in lines))
    (line,) = (line for line in lines if line["logger"] == "tokenry.requests")
    assert line["http_request"] == "my-own-id"
    assert (line["model"], line["output_tokens"], line["finish_reason"]) == ("demo", 5, "length")
    assert "secret" not in json.dumps(lines)


class Collector(HTTPServer):
    def __init__(self):
        self.spans = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        self.server.spans += [
            span for r in request.resource_spans for s in r.scope_spans for span in s.spans
        ]
        assert self.path == "/v1/traces"
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_request_is_a_span_with_its_parts_below_the_clients(start_toy):
    pytest.importorskip("opentelemetry.sdk")
    collector = Collector()
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    server = start_toy({"otlp_endpoint": endpoint}, TOY_STEP_S="0.005").wait_ready()
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "rid"}
    server.http.post("/v1/completions", json=BODY, headers=headers)
    assert server.close() == 0  # what is not sent yet is sent at the end
    collector.shutdown()
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"tokenry.request", "queue", "prefill", "decode"}
    whole = spans["tokenry.request"]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (trace, parent)
    values = {a.key: a.value for a in whole.attributes}
    assert values["gen_ai.usage.output_tokens"].int_value == 5
    assert values["tokenry.http_request_id"].string_value == "rid"
    for name in ("queue", "prefill", "decode"):
        part = spans[name]
        assert part.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= part.start_time_unix_nano
        assert part.start_time_unix_nano <= part.end_time_unix_nano <= whole.end_time_unix_nano
    assert spans["decode"].end_time_unix_nano - spans["decode"].start_time_unix_nano > 4 * 4e6
    assert "Once upon" not in str(collector.spans)


def test_a_collector_that_is_not_there_hinders_nobody(start_toy):
    pytest.importorskip("opentelemetry.sdk")
    server = start_toy(
        {"otlp_endpoint": "http://127.0.0.1:9"}, OTEL_EXPORTER_OTLP_TIMEOUT="1"
    ).wait_ready()
    assert server.http.post("/v1/completions", json=BODY).status_code == 200
    server.process.terminate()
    server.process.wait(60)


def sample(text, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    assert found, name
    return float(found[1])


def test_aliases_tell_what_our_own_names_tell(start_toy):
    server = start_toy(TOY_STEP_S="0.001").wait_ready()
    for _ in range(2):
        assert server.http.post("/v1/completions", json=BODY).status_code == 200
    server.http.post("/v1/completions", json={**BODY, "stream": True})
    assert server.http.post("/v1/completions", json={**BODY, "ttft_target_ms": 60000}).is_success
    headers = {"x-slo-deadline-ms": "0.001"}
    assert server.http.post("/v1/completions", json=BODY, headers=headers).is_success
    text = server.http.get("/metrics").text
    model = '{model_name="demo"}'
    for name in ("generation_tokens_total", "num_requests_running", "prefix_cache_queries_total"):
        own = sample(text, f"tokenry:{name}{model}")
        assert own == sample(text, f"vllm:{name}{model}"), name
    assert sample(text, f"tokenry:generation_tokens_total{model}") == 25
    for name, theirs in (
        ("e2e_request_latency_seconds", "tgi_request_duration"),
        ("request_queue_time_seconds", "tgi_request_queue_duration"),
        ("request_generation_tokens", "tgi_request_generated_tokens"),
    ):
        assert sample(text, f"tokenry:{name}_count{model}") == 5
        assert sample(text, f"vllm:{name}_sum{model}") == sample(text, f"{theirs}_sum{model}")
    assert sample(text, f"tgi_request_success{model}") == 5
    assert sample(text, f"tgi_request_count{model}") == 5
    assert sample(text, f"tgi_queue_size{model}") == 0
    within = 'tokenry:requests_with_targets_total{model_name="demo",result="within"}'
    missed = 'tokenry:requests_with_targets_total{model_name="demo",result="missed"}'
    deadline = 'tokenry:targets_missed_total{model_name="demo",target="deadline"}'
    assert [sample(text, name) for name in (within, missed, deadline)] == [1, 1, 1]
    assert text.count("# TYPE vllm:time_to_first_token_seconds ") == 1
    server.close()


@pytest.mark.parametrize("value", ["soon", "-1", "0", "inf", "nan"])
def test_a_wrong_target_is_refused_by_its_headers_name(toy, value):
    answer = toy.http.post("/v1/completions", json=BODY, headers={"x-slo-ttft-ms": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-slo-ttft-ms")
    answer = toy.http.post("/v1/completions", json={**BODY, "deadline_ms": -1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "deadline_ms")
