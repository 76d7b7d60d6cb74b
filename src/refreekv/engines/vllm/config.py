"""The plugin's options: the extra configuration of its KV connector."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from refreekv.core.quantisation import KVDtype
from refreekv.core.spelling import suggestion
from refreekv.engines import DEFAULT_POLICY
from refreekv.policies import Policy
from refreekv.policies.adaptive import Adaptive
from refreekv.policies.base import AUTO, check_count, check_flag
from refreekv.policies.registry import parse

CONNECTOR = "RefreekvConnector"
"""Name of the KV connector, as `--kv-transfer-config` spells it."""

CONNECTOR_MODULE = "refreekv.engines.vllm.connector"

EXACT = "16"
"""What `PluginOptions.kv_dtype` calls entries as the model computes them."""


@dataclass(frozen=True)
class PluginOptions:
    """What a user chooses, once for the whole server.

    Parameters
    ----------
    policy : str
        A policy in the command line's form, such as ``refreekv:threshold=0.05``.
    layers_per_group : int
        Consecutive layers that share one block table. They keep the union of what each of
        them would keep. 1 saves most; more layers cost the scheduler less.
    kv_dtype : str
        How kept entries of prompts are stored, such as ``"int4"`` or ``"k6v4"``, but for sinks and the newest;
        ``"16"``: as the model computes them. On GPUs only.
    prefix_hits : bool
        Whether policies that probe queries all over a prompt, such as `adaptive`, take prefix-cache hits all the same,
        and probe what is left to be computed. On GPUs only.
    log_requests : bool
        Whether a line of vLLM's log says of each finished request what was kept.
    """

    policy: str = DEFAULT_POLICY
    layers_per_group: int = 1
    kv_dtype: str = EXACT
    prefix_hits: bool = False
    log_requests: bool = False

    def __post_init__(self) -> None:
        parse(self.policy)
        check_count("layers_per_group", self.layers_per_group, minimum=1)
        check_flag("prefix_hits", self.prefix_hits)
        check_flag("log_requests", self.log_requests)
        self.number()

    @classmethod
    def of(cls, vllm_config: Any) -> "PluginOptions":
        """The options in a vLLM configuration; ValueError for unknown names and bad values."""
        extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        known = [field.name for field in fields(cls)]
        for name in extra:
            if name not in known:
                hint = suggestion(name, known)
                raise ValueError(f"kv_connector_extra_config has no option {name!r} (there are {known}){hint}")
        return cls(**extra)

    def build(self) -> Policy:
        """The policy; `adaptive` without the choice of widths, which vLLM's blocks do not have so far."""
        policy = parse(self.policy)
        return replace(policy, bits=16) if isinstance(policy, Adaptive) else policy

    def number(self) -> KVDtype | None:
        """How kept entries are stored; None: as they are."""
        if self.kv_dtype == EXACT:
            return None
        if self.kv_dtype == AUTO or "+" in self.kv_dtype:
            raise ValueError(
                f"kv_dtype={self.kv_dtype!r}: in vLLM all kept entries have one width so far; choose 16, int8, int4, "
                f"k8v4 or k6v4"
            )
        return KVDtype.parse(self.kv_dtype)

    def transfer_config(self) -> dict[str, Any]:
        """The value of ``--kv-transfer-config``."""
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            # A producer's role keeps vLLM's scheduling as it is without a connector.
            "kv_role": "kv_producer",
            "kv_connector_extra_config": asdict(self),
        }
