"""Libraries that sit on OpenAI's API: LiteLLM, LangChain; and what schemathesis makes of the
OpenAPI document.
"""

import subprocess
import sys
from pathlib import Path

import pytest

USER = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def litellm(url):
    import litellm

    litellm.suppress_debug_info = True
    litellm.num_retries = 0
    return {"api_base": f"{url}/v1", "api_key": "none", "model": "openai/demo"}


def test_c09_litellm_a_chat(litellm):
    import litellm as library

    answer = library.completion(messages=USER, max_tokens=5, temperature=0, **litellm)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 5


def test_c19_litellm_a_stream_with_usage(litellm):
    import litellm as library

    asked = {"messages": USER, "max_tokens": 5, "temperature": 0}
    whole = library.completion(**asked, **litellm).choices[0].message.content
    chunks = list(
        library.completion(**asked, stream=True, stream_options={"include_usage": True}, **litellm)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert chunks[-1].usage.completion_tokens == 5


def test_c03_litellm_an_unknown_model_is_its_not_found(litellm):
    import litellm as library

    with pytest.raises(library.NotFoundError):
        library.completion(**{**litellm, "model": "openai/nope"}, messages=USER)


def test_c04_litellm_too_long_is_its_context_window_error(litellm):
    import litellm as library

    long = [{"role": "user", "content": "king " * 5000}]
    with pytest.raises(library.ContextWindowExceededError):
        library.completion(messages=long, **litellm)


def test_c30_litellm_anthropics_messages(url):
    import litellm as library

    answer = library.completion(
        model="anthropic/demo", api_base=url, api_key="none", messages=USER, max_tokens=5
    )
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 5


@pytest.fixture(scope="module")
def langchain(url):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model="demo", base_url=f"{url}/v1", api_key="none", max_retries=0, max_tokens=6,
        temperature=0, stream_usage=True,
    )  # fmt: skip


def test_c09_langchain_a_chat(langchain):
    answer = langchain.invoke("Tell me a story.")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 6
    assert answer.response_metadata["finish_reason"] == "length"


def test_c20_langchain_a_stream_joins_to_the_whole(langchain):
    whole = langchain.invoke("Tell me a story.")
    joined = None
    for chunk in langchain.stream("Tell me a story."):
        joined = chunk if joined is None else joined + chunk
    assert joined.content == whole.content
    assert joined.usage_metadata["output_tokens"] == 6


def test_c04_langchain_too_long_is_a_bad_request(langchain):
    import openai

    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        langchain.invoke("king " * 5000)


def test_c01_schemathesis_finds_no_server_error(start_server, tmp_path):
    server = start_server("--max-model-len", "64", "--data-dir", str(tmp_path)).wait_ready()
    program = Path(sys.executable).parent / "schemathesis"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    done = subprocess.run(
        [
            *(program, "run", f"{server.url}/openapi.json", "--url", server.url),
            *("--phases", "coverage,fuzzing", "-n", "10", "--seed", "1", "--warnings", "off"),
            *("--checks", f"{checks},response_schema_conformance", "--continue-on-failure"),
            *("--exclude-path-regex", "^/admin", "--generation-database", "none"),
            *("--suppress-health-check", "all", "--no-color"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0
    assert server.http.get("/health/integrity").json() == {"ok": True}
    assert server.close() == 0
