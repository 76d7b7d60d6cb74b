"""``refreekv serve --engine transformers``: a model, its worker and the server, from the options."""

import contextlib
import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path

from refreekv.cli.app import UserError, one_line, refusals
from refreekv.cli.loading import Loaded, load

INSTALL = "pip install 'refreekv[serve]'"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
DISK = "8GB"


@dataclass(frozen=True)
class ServeOptions:
    """What a local server is told, as it was written."""

    policy: str
    kv_dtype: str = "auto"
    calibration: str | None = None
    verify: str | None = None
    keep_evicted: str = "auto"
    host_memory: str | None = None
    weights: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    api_key_file: str | None = None
    allow_origin: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_context: str | None = None
    cache_memory: str | None = None
    cache_disk: str = DISK
    cache_folder: str | None = None


def serve(model: str, options: ServeOptions) -> None:
    """Load the model and serve it until the process is interrupted.

    Raises
    ------
    UserError
        Something is not installed, an option cannot be, the port is taken, or the model cannot be served.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--engine transformers needs {', '.join(missing)}; run: {INSTALL}")
    from refreekv.cli.progress import stderr_console
    from refreekv.serving.application import is_loopback
    from refreekv.serving.server import address, listen, server

    key = _key(options)
    local = is_loopback(options.host)
    if not local and key is None:
        raise UserError(
            f"--host {options.host} lets other machines in, so an API key is needed: --api-key-file FILE or --api-key "
            "KEY (without --host the server is for this machine only)"
        )
    sizes = _Sizes.parse(options)
    try:
        listening = listen(options.host, options.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {options.host}, port {options.port}: {one_line(error)}") from error
    with listening:
        loaded = load(
            model,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            weights=options.weights,
            device_map=options.device_map,
        )
        app = _application(loaded, options, sizes, key, local=local)
        console = stderr_console()
        for line in _greeting(loaded, options, address(options.host, listening)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        _run(server(app), listening)


def _run(server: object, listening: socket.socket) -> None:
    from refreekv.cli.loading import quiet_transformers

    # Ctrl-C ends the server, and then comes here once more.
    with quiet_transformers(), contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Sizes:
    context: int | None
    memory: int | None
    disk: int

    @classmethod
    def parse(cls, options: ServeOptions) -> "_Sizes":
        from refreekv.core.units import parse_bytes, parse_tokens

        def size(text: str, what: str) -> int:
            return 0 if text == "0" else parse_bytes(text, what)

        with refusals():
            return cls(
                None if options.max_context is None else parse_tokens(options.max_context, "--max-context"),
                None if options.cache_memory is None else size(options.cache_memory, "--cache-memory"),
                size(options.cache_disk, "--cache-disk"),
            )


def _key(options: ServeOptions) -> str | None:
    key = options.api_key
    if options.api_key_file is not None:
        if key is not None:
            raise UserError("--api-key and --api-key-file exclude each other")
        try:
            key = Path(options.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --api-key-file {options.api_key_file}: {one_line(error)}") from error
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError("the API key must be of visible ASCII characters, at least one")
    return key


def _application(loaded: Loaded, options: ServeOptions, sizes: _Sizes, key: str | None, *, local: bool) -> object:
    from refreekv.cli import running
    from refreekv.cli.weights import weight_bytes
    from refreekv.serving.application import Access, create
    from refreekv.serving.conversations import Conversations
    from refreekv.serving.templates import TemplateRefusal
    from refreekv.serving.worker import Worker, memory_for_caches

    policy, kv_dtype = running.parse(options.policy, options.kv_dtype, 1)
    policy, kv_dtype, verify = running.calibrated(loaded, policy, kv_dtype, options.calibration, verify=options.verify)
    if verify and verify.where != "prompt":
        raise UserError(
            "--verify answer keeps a cache whole until its answer has begun, and a server may have to write it to a "
            "file before: use --verify prompt"
        )
    with refusals():
        limits = [limit for limit in (loaded.context, sizes.context) if limit is not None]
        conversations = Conversations(
            loaded.model,
            policy,
            kv_dtype=kv_dtype,
            verify=verify,
            keep_evicted=running.store_of(options.keep_evicted, loaded.device, options.host_memory),
            host_memory=options.host_memory,
            memory_limit=memory_for_caches(loaded.device) if sizes.memory is None else sizes.memory,
            disk_limit=sizes.disk,
            folder=options.cache_folder,
        )
        conversations.new_cache()  # refuse here what cannot be pruned
        try:
            worker = Worker(
                loaded.model,
                loaded.tokenizer,
                conversations,
                device=loaded.device,
                context=min(limits, default=None),
            )
        except TemplateRefusal as error:
            raise UserError(f"the chat template of {loaded.name} cannot be served: {one_line(error)}") from error
    access = Access(key, local=local, origins=options.allow_origin)
    name = options.served_model_name or loaded.name
    return create(worker, name, access=access, weight_bytes=weight_bytes(loaded.model))


def _greeting(loaded: Loaded, options: ServeOptions, where: str) -> list[str]:
    from refreekv.cli import running
    from refreekv.cli.weights import weight_bytes
    from refreekv.policies.base import ladder_for
    from refreekv.report import format_bytes

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    formats = ladder_for(*running.parse(options.policy, options.kv_dtype, 1))
    stored = f", stored in {formats}" if formats else ""
    return [
        f"{options.served_model_name or loaded.name}, {dtype} on {loaded.device}, weights "
        f"{format_bytes(weight_bytes(loaded.model))}; {options.policy}{stored}",
        f"Serving at {where} (Ctrl-C ends it)",
    ]
