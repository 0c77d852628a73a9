"""The command line: serve, generate, chat, devices, compile, bench, conform, buckets, plan,
version.

In: argv, a YAML file, TOKENRY_* variables. Out: an exit code: 0, 1 (it failed) or 2 (it was called
wrongly). An error is one cause and its mend on stderr. Each command imports what it needs when it
runs, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import tokenry
from tokenry.config import (
    EngineConfig,
    ServerConfig,
    add_arguments,
    check_file_keys,
    environment,
    load,
)
from tokenry.errors import ConfigError, TokenryError

if TYPE_CHECKING:
    from tokenry.async_engine import AsyncEngine
    from tokenry.params import SamplingParams

Command = Callable[[argparse.Namespace], int]
_DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(args)
    given = parser.parse_args(args)
    if "run" not in given:
        parser.print_help()
        return 2
    run: Command = given.run
    try:
        return run(given)
    except TokenryError as error:
        if environment("TOKENRY_LOG_LEVEL") == "debug":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has seen enough
        return 0


def _parser(args: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenry", description="Serve large language models on any accelerator."
    )
    parser.add_argument("--version", action="version", version=tokenry.__version__)
    commands = parser.add_subparsers(metavar="COMMAND")
    wanted = next((arg for arg in args if not arg.startswith("-")), None)
    for name, (text, fill) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == wanted:  # only the command that runs pays for its options
            fill(command)
    return parser


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory, hub id or installed model ('demo')")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, ServerConfig)
    add_arguments(parser, EngineConfig, skip=("model",))
    parser.add_argument("--model", dest="model_flag", help=argparse.SUPPRESS)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from tokenry.api.server import serve

    return serve(_config(EngineConfig, args), _config(ServerConfig, args))


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory, hub id or installed model ('demo')")
    parser.add_argument("prompt", nargs="+", help="one or more prompts; '-' reads stdin")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    _sampling_options(parser, max_tokens=128)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, EngineConfig, skip=("model", "seed"))
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    config, params = _config(EngineConfig, args, skip=("seed",)), _params(args)

    async def run() -> None:
        engine = await _start(config, quiet=args.quiet)
        try:
            for prompt in prompts:
                print(prompt, end="", flush=True)
                async for text in _deltas(engine, engine.tokenizer.encode(prompt), params):
                    print(text, end="", flush=True)
                print(flush=True)
        finally:
            await engine.shutdown()

    asyncio.run(run())
    return 0


def _chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="start this model here, instead of a server")
    parser.add_argument("--url", default=_DEFAULT_URL, help=f"server (default: {_DEFAULT_URL})")
    parser.add_argument("--api-key", default="", help="key that the server asks for")
    parser.add_argument("--system", help="first message, of the role system")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    _sampling_options(parser, max_tokens=None)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, EngineConfig, skip=("model", "seed"))
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    if args.model is None:
        return _chat_with_server(args)
    config, params = _config(EngineConfig, args, skip=("seed",)), _params(args)

    async def run() -> None:
        engine = await _start(config, quiet=args.quiet)
        try:
            messages = _opening(args)
            while (line := await asyncio.to_thread(_ask)) is not None:
                messages.append({"role": "user", "content": line})
                text = engine.tokenizer.chat_template.render(messages)
                ids, answer = engine.tokenizer.encode(text, add_special_tokens=False), ""
                async for delta in _deltas(engine, ids, params):
                    answer += delta
                    print(delta, end="", flush=True)
                print(flush=True)
                messages.append({"role": "assistant", "content": answer})
        finally:
            await engine.shutdown()

    asyncio.run(run())
    return 0


def _chat_with_server(args: argparse.Namespace) -> int:
    """A client of any server with OpenAI's API; needs no torch."""
    messages = _opening(args)
    while (line := _ask()) is not None:
        messages.append({"role": "user", "content": line})
        answer = ""
        for delta in _post_chat(args, messages):
            answer += delta
            print(delta, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
    return 0


def _post_chat(args: argparse.Namespace, messages: list[dict[str, str]]) -> Any:
    import httpx2

    body: dict[str, Any] = {"messages": messages, "stream": True, "temperature": args.temperature}
    body |= {name: v for name in ("max_tokens", "seed") if (v := getattr(args, name)) is not None}
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    url = args.url.rstrip("/") + "/v1/chat/completions"
    try:
        with httpx2.stream("POST", url, json=body, headers=headers, timeout=600) as response:
            if response.status_code != 200:
                raise TokenryError(_error_text(response.read()), mend=f"see {args.url}/readyz")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise TokenryError(chunk["error"]["message"])
                if chunk["choices"]:
                    yield chunk["choices"][0]["delta"].get("content") or ""
    except httpx2.TransportError as error:
        raise TokenryError(
            f"No server answers at {args.url}: {error}.",
            mend="tokenry serve demo, or --url URL, or `tokenry chat demo` without a server",
        ) from error


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500] or "The server gave no answer."


def _devices_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="absent backends and simulators, too")
    parser.set_defaults(run=_devices)


def _devices(args: argparse.Namespace) -> int:
    from tokenry.backend.discovery import absent, discover, simulators, table

    probes = discover()
    usable = any(probe.state == "usable" for probe in probes)
    rows = probes if usable and not args.all else [*probes, *absent(probes)]
    print(table([*rows, *simulators()] if args.all else rows))
    return 0


def _compile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory, hub id or installed model ('demo')")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, EngineConfig, skip=("model",))
    parser.set_defaults(run=_compile)


def _compile(args: argparse.Namespace) -> int:
    from tokenry.backend.discovery import check_installed

    config = _config(EngineConfig, args)
    check_installed(config.backend)
    from tokenry.assemble import assemble

    def show(phase: str, share: float) -> None:
        print(f"{phase} {share:.0%}", file=sys.stderr)

    ready = assemble(config, show, compile_only=True)
    programs = ready.engine.stats().programs
    print(
        f"{programs} programs of {ready.ready.architecture} ({ready.ready.dtype}) for "
        f"{ready.ready.backend} with {ready.ready.num_blocks} KV blocks are compiled"
    )
    return 0


def _bench_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    bench = import_module("tokenry.bench.cli")
    bench.add_arguments(parser)
    parser.set_defaults(run=bench.run)


def _conform_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    conformance = import_module("tokenry.conformance.cli")
    conformance.add_arguments(parser)
    parser.set_defaults(run=conformance.run)


def _buckets_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.planning.buckets_command").add_arguments(parser)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.planning.plan_command").add_arguments(parser)


def _version_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_version)


def _version(args: argparse.Namespace) -> int:
    print(tokenry.__version__)
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "serve": ("serve a model over HTTP, with OpenAI's API and a page", _serve_options),
    "generate": ("continue prompts here, without a server", _generate_options),
    "chat": ("talk with a server, or with a model started here", _chat_options),
    "devices": ("which backends and devices there are, and why not others", _devices_options),
    "compile": ("fill a backend's cache of programs, also without its device", _compile_options),
    "bench": ("measure", _bench_options),
    "conform": ("ask a backend whether it keeps the contract's rules", _conform_options),
    "buckets": ("which programs a device would get, and their padding", _buckets_options),
    "plan": ("does a model fit on a device, from its config.json alone", _plan_options),
    "version": ("print the version", _version_options),
}


def _sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="longest answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--seed", type=int, help="same seed, same text")


def _params(args: argparse.Namespace) -> SamplingParams:
    from tokenry.params import SamplingParams

    return SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)


def _config(cls: Any, args: argparse.Namespace, *, skip: Sequence[str] = ()) -> Any:
    names = set(cls.__dataclass_fields__) - set(skip)
    given = {name: value for name, value in vars(args).items() if name in names}
    if "model" in names:
        model = given.pop("model", None) or getattr(args, "model_flag", None)
        given |= {} if model is None else {"model": model}
    if args.config:
        check_file_keys(args.config)
    return load(cls, given, file=args.config)


def _opening(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _ask() -> str | None:
    """The next line of the user, None at the end; no prompt where nobody types."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return line if line.strip() else _ask()


async def _start(config: EngineConfig, *, quiet: bool) -> AsyncEngine:
    from tokenry.async_engine import AsyncEngine
    from tokenry.startup import StartLog, describe, follow

    log, engine = StartLog(shown=not quiet), AsyncEngine(config)

    async def launch() -> None:
        await engine.launch()
        await engine.wait_ready()

    task = asyncio.create_task(launch())
    try:
        await follow(log, lambda: engine.progress, task)
        await task
    except BaseException:
        await engine.shutdown()
        raise
    log.say(*describe(engine.ready))
    return engine


async def _deltas(
    engine: AsyncEngine, ids: Sequence[int], params: SamplingParams
) -> AsyncIterator[str]:
    async for output in engine.generate(ids, params, kind="delta"):
        for one in output.outputs:
            yield one.text


if __name__ == "__main__":
    sys.exit(main())
