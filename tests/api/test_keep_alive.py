"""A silent stream shows that it lives."""

BODY = {"prompt": "Once", "max_tokens": 400, "temperature": 0}


def test_silent_stream_carries_comments(start_toy):
    server = start_toy({"keep_alive_s": 0.1}, TOY_STEP_S="0.4").wait_ready()
    body = {**BODY, "max_tokens": 2, "stream": True}
    text = server.http.post("/v1/completions", json=body).text
    assert ": keep-alive\n\n" in text
    assert text.endswith("data: [DONE]\n\n")
    server.close()
