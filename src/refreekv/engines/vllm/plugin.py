"""vLLM's entry point: gives the connector its name in every vLLM process. Changes nothing else."""


def register() -> None:
    """Make ``{"kv_connector": "RefreekvConnector"}`` known; called by vLLM when it loads plugins."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from refreekv.engines.vllm.config import CONNECTOR, CONNECTOR_MODULE

    try:
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    except ValueError:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
