"""``refine-fast serve``: a run's index as a web page and a JSON endpoint."""

from __future__ import annotations

import os
import secrets
import socket
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

from ...errors import RefineFastError
from ..console import Console
from ..serving.judged import JUDGED, Judged
from .search import open_searcher

TOKEN_VARIABLE = "REFINE_FAST_TOKEN"
"""Environment variable with the token; without it a new one is made at each start."""

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "[")
"""Values of Host that are answered at a loopback address. "[" is what starlette up to 1.0 at least
makes of "[::1]:8765", which it cuts at the first colon; no name of another site is cut to that."""


def serve(out: Path, host: str, port: int, console: Console) -> None:
    """Answers until it is stopped.

    Args:
        out: the run folder, with an index.
        host: the address to listen at. Any but a loopback address needs a token.
        port: 0: a free one.
        console: told the address.

    Raises:
        RefineFastError: no index, a missing package, or an address that cannot be used.
    """
    try:
        import uvicorn

        from ..serving.web import application
    except ModuleNotFoundError as error:
        raise RefineFastError(
            f"serve: needs the package {error.name}; pip install 'refine-fast[serve]'."
        ) from None
    local = is_loopback(host)
    given = os.environ.get(TOKEN_VARIABLE)
    token = given or (None if local else secrets.token_urlsafe(24))
    searcher = open_searcher(out, console)
    searcher.search("ready", 1)  # loads the encoders
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise RefineFastError(
                f"serve: cannot listen at {host}:{port} ({error}); give another --host or --port."
            ) from None
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        address += "" if token is None else f"?token={quote(token, safe='')}"
        app = application(
            searcher,
            Judged(out / JUDGED),
            token=token,
            hosts=[*LOCAL_HOSTS, shown] if local else None,
        )
        console.result({"address": address})
        said = f"search at {address}; marks go to {out / JUDGED}; Ctrl-C stops it"
        if console.quiet and token is not None and not given:
            console.warn(said)  # nobody else knows the token
        else:
            console.say(said)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
