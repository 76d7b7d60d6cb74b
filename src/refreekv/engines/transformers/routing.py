"""The way of attention through refreekv: names of implementations in configurations, and what they were before."""

import threading
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from refreekv.engines.transformers.attention import PREFIX, twin

_lock = threading.RLock()
_routes: dict[int, "Route"] = {}


class Route:
    """One configuration whose attention goes through refreekv; counted, as models may share one.

    Attributes
    ----------
    config : PreTrainedConfig
        What attention modules read the name of their implementation off.
    base : str or None
        The name as it was, or as somebody else has set it since.
    """

    def __init__(self, config: PreTrainedConfig, base: str | None):
        self.config, self.base = config, base
        self.users = 1

    @classmethod
    def take(cls, configs: Iterable[PreTrainedConfig]) -> list["Route"]:
        """Route these configurations; none of them if one has an implementation that is not supported."""
        with _lock:
            configs = list(configs)
            for config in configs:
                twin(_base(config) or "eager")
            return [cls._take(config) for config in configs]

    @classmethod
    def _take(cls, config: PreTrainedConfig) -> "Route":
        route = _routes.get(id(config))
        if route is None:
            route = _routes[id(config)] = cls(config, _base(config))
        else:
            route.users += 1
        route.ensure()
        return route

    def ensure(self) -> None:
        """Route again if somebody has set another implementation meanwhile; it is what goes back in the end.

        Raises
        ------
        ValueError
            That implementation is not supported.
        """
        name = self.config._attn_implementation
        if not (name or "").startswith(PREFIX):
            routed = twin(name or "eager")
            self.base = name
            self.config._attn_implementation_internal = routed  # this configuration only, not its parts

    def give_back(self) -> None:
        """One user less; the last one puts the name back, unless it is somebody else's by now."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            if _routes.get(id(self.config)) is self:
                del _routes[id(self.config)]
            if (self.config._attn_implementation or "").startswith(PREFIX):
                self.config._attn_implementation_internal = self.base

    def of_copy(self, config: PreTrainedConfig) -> "Route":
        """The route of a copied configuration, which is routed as the original was when it was copied."""
        return Route(config, self.base)


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Configurations that the decoder's attention modules and its masks read."""
    text = model.config.get_text_config(decoder=True)
    found = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and hasattr(module, "layer_idx"):
            found[id(config)] = config
    return list(found.values())


def _base(config: PreTrainedConfig) -> str | None:
    name: str | None = config._attn_implementation
    return name if name is None else name.removeprefix(PREFIX)
