"""A local server in a thread of the tests' process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from refreekv.cli.loading import Loaded
from refreekv.serving.application import Access, create
from refreekv.serving.conversations import Conversations
from refreekv.serving.server import address, listen, server
from refreekv.serving.worker import Worker


@dataclass
class Running:
    """A server that runs, and what is behind it."""

    url: str
    worker: Worker
    conversations: Conversations

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=60, **options)

    def idle(self) -> None:
        """Wait until no request is on its way."""
        until(lambda: self.worker.running + self.worker.waiting == 0)


def until(is_so: Any, seconds: float = 30) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def served(
    loaded: Loaded,
    policy: Any,
    *,
    access: Access | None = None,
    name: str = "tiny",
    **limits: Any,
) -> Iterator[Running]:
    """Serve a model until the block is left."""
    context, chunk = limits.pop("context", loaded.context), limits.pop("chunk", None)
    conversations = Conversations(loaded.model, policy, **{"memory_limit": 2**30, "disk_limit": 2**30, **limits})
    worker = Worker(loaded.model, loaded.tokenizer, conversations, device=loaded.device, context=context, chunk=chunk)
    listening: socket.socket = listen("127.0.0.1", 0)
    running = server(create(worker, name, access=access or Access(), weight_bytes=12345))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until(lambda: running.started)
        yield Running(address("127.0.0.1", listening), worker, conversations)
    finally:
        running.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
