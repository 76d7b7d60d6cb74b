"""The vLLM arguments that switch the plugin on."""

import json
from typing import Any

from refreekv.engines.vllm.config import PluginOptions

WORKER = "refreekv.engines.vllm.worker.RefreekvCPUWorker"


def engine_arguments(options: PluginOptions | None = None) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` or ``EngineArgs``."""
    options = options or PluginOptions()
    return {"kv_transfer_config": options.transfer_config(), "worker_cls": WORKER}


def serve_command(model: str, options: PluginOptions, more: list[str]) -> list[str]:
    """The arguments of ``vllm serve``, after ``vllm``.

    Parameters
    ----------
    model : str
        What vLLM takes for a model.
    options : PluginOptions
        The plugin's.
    more : list of str
        Further arguments of ``vllm serve``, passed on as they are.
    """
    return [
        "serve",
        model,
        "--worker-cls",
        WORKER,
        "--kv-transfer-config",
        json.dumps(options.transfer_config()),
        *more,
    ]
