"""The plugin's options: the extra configuration of its KV connector."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from refreekv.core.quantisation import Ladder
from refreekv.core.spelling import suggestion
from refreekv.engines import DEFAULT_POLICY
from refreekv.policies import Policy
from refreekv.policies.base import AUTO, check_count, check_flag, ladder_for
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
        How kept entries of prompts are stored, but for sinks and the newest: ``"auto"``, in the number formats of the
        policy's own; ``"16"``, as the model computes them; a format such as ``"int8"`` or ``"k6v4"``, or several,
        ``"k4v2+int8"``. On CPUs ``"auto"`` means 16.
    prefix_hits : bool, optional
        Whether policies that probe queries all over a prompt, such as `adaptive`, take prefix-cache hits all the
        same, and probe what is left to be computed. None: on GPUs they do, on CPUs they cannot.
    log_requests : bool
        Whether a line of vLLM's log says of each finished request what was kept.
    coded_answers : bool
        Whether an answer's older tokens are coded, too, where its prompt's entries are; else answers stay in 16 bits.
    """

    policy: str = DEFAULT_POLICY
    layers_per_group: int = 1
    kv_dtype: str = AUTO
    prefix_hits: bool | None = None
    log_requests: bool = False
    coded_answers: bool = True

    def __post_init__(self) -> None:
        parse(self.policy)
        check_count("layers_per_group", self.layers_per_group, minimum=1)
        if self.prefix_hits is not None:
            check_flag("prefix_hits", self.prefix_hits)
        check_flag("log_requests", self.log_requests)
        check_flag("coded_answers", self.coded_answers)
        self.ladder()

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
        """The policy."""
        return parse(self.policy)

    def ladder(self) -> Ladder | None:
        """Number formats that kept entries are stored in; None: as they are."""
        return ladder_for(self.build(), None if self.kv_dtype == EXACT else self.kv_dtype)

    def transfer_config(self) -> dict[str, Any]:
        """The value of ``--kv-transfer-config``."""
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            # A producer's role keeps vLLM's scheduling as it is without a connector.
            "kv_role": "kv_producer",
            "kv_connector_extra_config": asdict(self),
        }
