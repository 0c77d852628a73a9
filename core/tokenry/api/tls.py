"""HTTPS: are the certificate and its key usable, known before anything is loaded.

In: the files' names. Out: keyword arguments for the HTTP server, or a ConfigError that names the
flag.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from tokenry.config import ServerConfig, flag_of
from tokenry.errors import ConfigError


def tls_options(config: ServerConfig) -> dict[str, Any]:
    """What uvicorn needs for HTTPS; {} without a certificate."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return {}
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = Path(getattr(config, name))
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{flag_of(name)} {path} cannot be read: {error.strerror}.",
                mend=f"{flag_of(name)} FILE.pem",
            ) from error
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # a key with a passphrase must not ask for it on the terminal: it is refused
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{config.ssl_certfile} and {config.ssl_keyfile} are no certificate and its key: "
            f"{error}.",
            mend="PEM files that belong together, the key without a passphrase",
        ) from error
    return {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
