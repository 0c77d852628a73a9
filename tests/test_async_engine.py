"""AsyncEngine over a real engine process and a real EngineCore; only the model is a toy."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from tokenry.async_engine import AsyncEngine
from tokenry.config import EngineConfig
from tokenry.errors import ConfigError, EngineDead, ModelLoadError, RequestError, StepFailed
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.text.outputs import OutputProcessor, RequestState

CONFIG = EngineConfig(model="demo", backend="cpu", max_num_seqs=64)


@pytest.fixture(autouse=True)
def toy_on_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "api"))


def run(story, **environ):
    async def whole():
        engine = await AsyncEngine.start(CONFIG, factory="toy_engine:make")
        try:
            return await asyncio.wait_for(story(engine), 30)
        finally:
            await engine.shutdown()

    return asyncio.run(whole())


async def last(stream):
    return [output async for output in stream][-1]


async def until_idle(engine):
    for _ in range(200):
        stats = await engine.stats()
        if stats.num_running + stats.num_waiting == 0:
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError(f"still busy: {stats}")


def test_generate_streams_until_max_tokens():
    async def story(engine):
        seen = [o async for o in engine.generate("Once", SamplingParams(max_tokens=5))]
        assert len(seen[-1].outputs[0].token_ids) == 5
        assert seen[-1].outputs[0].finish_reason == "length"
        assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]

    run(story)


def test_many_requests_at_once_each_get_their_own_answer():
    async def story(engine):
        params = [SamplingParams(max_tokens=8, seed=i) for i in range(30)]
        alone = [await last(engine.generate("Once", p)) for p in params]
        together = await asyncio.gather(*(last(engine.generate("Once", p)) for p in params))
        assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
        await engine.check_integrity()

    run(story)


def test_closed_iterators_leave_nothing_behind(monkeypatch):
    monkeypatch.setenv("TOY_STEP_S", "0.005")

    async def story(engine):
        for _ in range(50):
            stream = engine.generate("Once upon a time", SamplingParams(max_tokens=400))
            await anext(stream)
            await stream.aclose()
        stats = await until_idle(engine)
        assert stats.num_requests_aborted == 50
        assert engine.num_requests == 0
        await engine.check_integrity()

    run(story)


def test_bad_request_is_refused_before_anything_starts():
    async def story(engine):
        with pytest.raises(RequestError, match="maximum context length is 512 tokens"):
            await last(engine.generate([5] * 600))
        assert engine.num_requests == 0

    run(story)


def test_aborting_by_id_ends_the_waiting_iteration(monkeypatch):
    monkeypatch.setenv("TOY_STEP_S", "0.01")

    async def story(engine):
        params = SamplingParams(max_tokens=400)
        waiting = asyncio.create_task(last(engine.generate("Once", params, "long")))
        await asyncio.sleep(0.1)
        engine.abort("long")
        with pytest.raises(RequestError, match="aborted"):
            await waiting
        assert engine.num_completions == 0
        await until_idle(engine)
        await engine.check_integrity()

    run(story)


def test_value_that_cannot_be_sent_leaves_nothing_behind():
    async def story(engine):
        params = SamplingParams(extra_args={"size": 2**70})
        with pytest.raises(RequestError, match="cannot be sent"):
            await last(engine.generate("Once", params))
        assert engine.num_requests == engine.num_completions == 0
        assert (await last(engine.generate("Once"))).finished

    run(story)


def test_command_that_cannot_be_read_fails_its_sender_and_nobody_else(monkeypatch):
    monkeypatch.setenv("TOY_STEP_S", "0.005")

    async def story(engine):
        params = SamplingParams(max_tokens=60, seed=3)
        alone = await last(engine.generate("Once", params))
        other = asyncio.create_task(last(engine.generate("Once", params)))
        with pytest.raises(RequestError, match="cache_salt"):
            await last(engine.generate("Once", cache_salt=5))
        wrong = SamplingParams(max_tokens=5)
        msgspec.structs.force_setattr(wrong, "n", 0)  # as a front of another version might send
        engine._handle.send(AddRequest(request_id="x#0", token_ids=(5,), params=wrong))
        assert (await other).outputs[0].token_ids == alone.outputs[0].token_ids
        assert engine.num_requests == 0
        engine.check_health()

    run(story)


def test_prompt_ids_that_are_no_whole_numbers_are_refused():
    async def story(engine):
        for ids in ([5, 1.5], [5, "6"], [True]):
            with pytest.raises(RequestError, match="whole number") as caught:
                await last(engine.generate(ids))
            assert caught.value.param == "prompt"
        assert engine.num_requests == 0

    run(story)


def test_seed_that_is_no_whole_number_is_refused_and_the_engine_lives():
    async def story(engine):
        with pytest.raises(RequestError, match="seed"):
            await last(engine.generate("Once", SamplingParams(seed=1.5)))
        engine.check_health()
        assert (await last(engine.generate("Once"))).finished

    run(story)


def test_what_only_the_engine_can_refuse_keeps_its_field_and_status(monkeypatch):
    monkeypatch.setenv("TOY_MAX_TOP_K", "50")

    async def story(engine):
        with pytest.raises(RequestError, match="draws from 50") as caught:
            await last(engine.generate("Once", SamplingParams(top_k=51)))
        assert (caught.value.param, caught.value.status) == ("top_k", 400)
        assert (await last(engine.generate("Once", SamplingParams(top_k=50)))).finished

    run(story)


def test_fault_in_the_text_of_one_request_fails_it_alone(monkeypatch):
    monkeypatch.setenv("TOY_STEP_S", "0.005")
    whole = RequestState.update

    def broken(self, index, event):
        if self.request_id == "odd" and len(event.token_ids):
            raise ZeroDivisionError("planted")
        return whole(self, index, event)

    async def story(engine):
        monkeypatch.setattr(RequestState, "update", broken)
        params = SamplingParams(max_tokens=40)
        other = asyncio.create_task(last(engine.generate("Once", params)))
        with pytest.raises(StepFailed, match="ZeroDivisionError: planted"):
            await last(engine.generate("Once", SamplingParams(max_tokens=400, n=2), "odd"))
        assert (await other).finished
        assert (await until_idle(engine)).num_requests_aborted == 2
        assert engine.num_completions == 0
        await engine.check_integrity()

    run(story)


def test_fault_of_the_front_is_told_to_every_waiting_request(monkeypatch):
    def broken(self, event):
        raise ZeroDivisionError

    async def story(engine):
        monkeypatch.setattr(OutputProcessor, "update", broken)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            await last(engine.generate("Once"))
        with pytest.raises(EngineDead):
            engine.check_health()

    run(story)


def test_killed_engine_answers_every_waiting_request(monkeypatch):
    monkeypatch.setenv("TOY_STEP_S", "0.02")

    async def story(engine):
        params = SamplingParams(max_tokens=400)
        waiting = [asyncio.ensure_future(last(engine.generate("Once", params))) for _ in range(4)]
        await asyncio.sleep(0.2)
        os.kill(engine.pid, signal.SIGKILL)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(a, EngineDead) and "SIGKILL" in str(a) for a in answers)
        with pytest.raises(EngineDead, match="SIGKILL"):
            engine.check_health()

    run(story)


def test_no_room_for_the_socket_is_one_error_that_names_the_directory(tmp_path, monkeypatch):
    full = tmp_path / "not-a-directory"
    full.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(full))

    async def story():
        await AsyncEngine.start(CONFIG, factory="toy_engine:make")

    with pytest.raises(ConfigError) as caught:
        asyncio.run(story())
    assert str(full) in caught.value.message
    assert "TMPDIR" in caught.value.mend


def test_a_running_engine_has_no_file_that_a_kill_could_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def story(engine):
        assert not list(tmp_path.iterdir())
        output = await last(engine.generate("Once", SamplingParams(max_tokens=3)))
        assert len(output.outputs[0].token_ids) == 3

    run(story)


def test_failed_start_raises_the_cause_with_its_mend(monkeypatch):
    monkeypatch.setenv("TOY_FAIL", "1")

    async def story():
        await AsyncEngine.start(CONFIG, factory="toy_engine:make")

    with pytest.raises(ModelLoadError, match="The toy is broken") as caught:
        asyncio.run(story())
    assert caught.value.mend == "glue it"


def test_engine_process_ends_with_its_parent_and_leaves_no_file(tmp_path):
    script = (
        "import asyncio, os\n"
        "from tokenry.async_engine import AsyncEngine\n"
        "from tokenry.config import EngineConfig\n"
        "async def main():\n"
        "    config = EngineConfig(model='demo')\n"
        "    engine = await AsyncEngine.start(config, factory='toy_engine:make')\n"
        "    print(engine.pid, flush=True)\n"
        "    os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or _is_zombie(pid):
            assert not list(tmp_path.iterdir())
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"the engine process {pid} outlives its parent")


def _is_zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_front_imports_no_torch():
    script = (
        "import sys, tokenry.async_engine, tokenry.api.server; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
