"""The command line: serve, generate, chat, devices, compile, bench, conform, buckets, plan, keys,
doctor, version.

In: argv, a YAML file, TOKENRY_* variables. Out: an exit code: 0, 1 (it failed) or 2 (it was called
wrongly). An error is one cause and its mend on stderr. Each command imports what it needs when it
runs, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tokenry
from tokenry.config import (
    EngineConfig,
    ServerConfig,
    add_arguments,
    check_file_keys,
    environment,
    flag_of,
    load,
)
from tokenry.errors import ConfigError, TokenryError
from tokenry.sampling_flags import add_sampling_flags, given_sampling

Command = Callable[[argparse.Namespace], int]
_DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(args)
    given, unknown = parser.parse_known_args(args)
    if unknown:
        _refuse_unknown(given.parser if "parser" in given else parser, unknown[0])
    if "run" not in given:
        parser.print_help()
        return 2
    run: Command = given.run
    try:
        status = run(given)
        sys.stdout.flush()
        return status
    except TokenryError as error:
        _note_failure(args, given, error)
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
    except (ImportError, RuntimeError, MemoryError) as error:
        _note_failure(args, given, error)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        with contextlib.suppress(OSError):  # or the interpreter fails once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        name = error.filename or "standard output"
        print(f"{name} cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _refuse_unknown(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    """The usage of the command that it was given to, and the flag that was perhaps meant."""
    flags = re.findall(r"--[a-z][\w-]+", parser.format_help())
    near = difflib.get_close_matches(argument.partition("=")[0], flags, n=1)
    parser.error(f"unknown argument {argument}" + (f"; did you mean {near[0]}?" if near else ""))


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
            command.set_defaults(parser=command)
            fill(command)
    return parser


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="model",
        help="directory, hub id or installed model ('demo'); each of several gets an engine "
        "process of its own, and requests are routed by their `model`",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, ServerConfig)
    add_arguments(parser, EngineConfig, skip=("model",))
    parser.add_argument("--model", dest="model_flag", help=argparse.SUPPRESS)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from tokenry.api.server import serve

    server = _config(ServerConfig, args)
    try:
        args.model = args.models[0] if args.models else None
        engine = _config(EngineConfig, args)
    except ConfigError as error:
        if error.message.startswith("No model") and len(server.served_model_name) > 1:
            error.mend = f"MODEL before --served-model-name; {error.mend}"
        raise
    others = [dataclasses.replace(engine, model=model) for model in args.models[1:]]
    return serve([engine, *others], server)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?",
        help="directory, hub id or installed model ('demo'); may be left out before a single "
        "prompt if TOKENRY_MODEL or the file names one",
    )  # fmt: skip
    parser.add_argument("prompt", nargs="+", help="one or more prompts; '-' reads stdin")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_sampling_flags(parser, longest="128, or what the context has room for")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, EngineConfig, skip=("model", "seed"))
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    from tokenry.terminal import generate

    if len(args.prompt) > 1 and args.model is None:  # argparse gives the first to `model`
        raise AssertionError(args.prompt)
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    config = _config(EngineConfig, args, skip=("seed",))
    asyncio.run(generate(config, prompts, given_sampling(args), quiet=args.quiet))
    return 0


def _chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="start this model here; with --url: the server's model to talk to"
    )
    parser.add_argument("--url", help=f"server (default, without a model: {_DEFAULT_URL})")
    parser.add_argument("--api-key", default="", help="key that the server asks for")
    parser.add_argument("--system", help="first message, of the role system")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_sampling_flags(parser, longest="what the context has room for")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, EngineConfig, skip=("model", "seed"))
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from tokenry.terminal import chat_here, chat_with_server

    opening = [{"role": "system", "content": args.system}] if args.system else []
    if args.model is not None and args.url is None:
        config = _config(EngineConfig, args, skip=("seed",))
        asyncio.run(chat_here(config, opening, given_sampling(args), quiet=args.quiet))
        return 0
    own = [f.name for f in dataclasses.fields(EngineConfig) if f.name not in ("model", "seed")]
    if given := [name for name in own if name in vars(args)]:
        raise ConfigError(
            f"{flag_of(given[0])} is an option of an engine, and this is a chat with the server "
            f"at --url {args.url or _DEFAULT_URL}.",
            mend="give it to tokenry serve, or chat MODEL without --url",
        )
    body = given_sampling(args) | ({} if args.model is None else {"model": args.model})
    chat_with_server(args.url or _DEFAULT_URL, args.api_key, opening, body)
    return 0


def _devices_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="absent backends and simulators, too")
    parser.add_argument("--json", action="store_true", help="a list of objects, not a table")
    parser.set_defaults(run=_devices)


def _devices(args: argparse.Namespace) -> int:
    import msgspec

    from tokenry.backend.discovery import absent, discover, simulators, table

    probes = discover()
    usable = any(probe.state == "usable" for probe in probes)
    rows = probes if usable and not args.all else [*probes, *absent(probes)]
    rows = [*rows, *simulators()] if args.all else rows
    print(msgspec.json.encode(rows).decode() if args.json else table(rows))
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


def _quantize_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.bench.quality").add_arguments(parser)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.doctor").add_arguments(parser)


def _note_failure(args: Sequence[str], given: argparse.Namespace, error: BaseException) -> None:
    """Of a start, for `tokenry doctor`."""
    if given.run in (_serve, _generate, _compile):
        from tokenry.doctor import remember

        remember(["tokenry", *args], error)


def _keys_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.api.keys_command").add_arguments(parser)


def _run_batch_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.api.batch_command").add_batch_arguments(parser)


def _embed_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.embed_command").add_embed_arguments(parser)


def _watermark_options(parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module("tokenry.watermark").add_arguments(parser)


def _version_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_version)


def _version(args: argparse.Namespace) -> int:
    print(tokenry.__version__)
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "serve": ("serve a model over HTTP, with OpenAI's API and a page", _serve_options),
    "generate": ("continue prompts here, without a server", _generate_options),
    "embed": ("embeddings or classes of texts here, without a server", _embed_options),
    "run-batch": ("answer a file of requests here, without a server", _run_batch_options),
    "chat": ("talk with a server, or with a model started here", _chat_options),
    "devices": ("which backends and devices there are, and why not others", _devices_options),
    "compile": ("fill a backend's cache of programs, also without its device", _compile_options),
    "bench": ("measure", _bench_options),
    "conform": ("ask a backend whether it keeps the contract's rules", _conform_options),
    "buckets": ("which programs a device would get, and their padding", _buckets_options),
    "plan": ("does a model fit on a device, from its config.json alone", _plan_options),
    "quantize": ("what quantised weights cost in quality, on a text", _quantize_options),
    "doctor": (
        "what was found, what was refused and why, and the last failed start",
        _doctor_options,
    ),
    "keys": ("API keys: add, list, remove", _keys_options),
    "watermark": ("does a text carry a mark made with a key", _watermark_options),
    "version": ("print the version", _version_options),
}


def _config(cls: Any, args: argparse.Namespace, *, skip: Sequence[str] = ()) -> Any:
    names = set(cls.__dataclass_fields__) - set(skip)
    given = {name: value for name, value in vars(args).items() if name in names}
    if "model" in names:
        model = given.pop("model", None) or getattr(args, "model_flag", None)
        given |= {} if model is None else {"model": model}
    if args.config:
        check_file_keys(args.config)
    return load(cls, given, file=args.config)


if __name__ == "__main__":
    sys.exit(main())
