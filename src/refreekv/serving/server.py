"""A socket, and uvicorn on it."""

import asyncio
import socket
from typing import Any

import uvicorn

GRACE = 3
"""Seconds that open connections have to end once the server is asked to."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def address(host: str, listening: socket.socket) -> str:
    """Where clients find the API."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}/v1"


def server(app: Any) -> uvicorn.Server:
    """What serves an application until it is interrupted: ``server(app).run(sockets=[listen(…)])``."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
    return _Server(config)


class _Server(uvicorn.Server):
    """One that stops answers while who waits for them can still be told."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, within `GRACE` seconds; uvicorn would break off what is left by then, with a traceback for each."""
        asyncio.get_running_loop().call_later(GRACE / 2, self.config.app.state.stop)  # type: ignore[union-attr]
        await super().shutdown(sockets=sockets)
