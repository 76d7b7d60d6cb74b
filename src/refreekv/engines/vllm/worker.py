"""The worker class for the device that this vLLM is for."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from refreekv.engines.vllm.worker_side.worker import RefreekvCPUWorker as RefreekvWorker
else:
    from refreekv.engines.vllm.gpu.worker import RefreekvGPUWorker as RefreekvWorker

__all__ = ["RefreekvWorker"]
