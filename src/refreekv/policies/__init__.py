"""What to probe, how to score, when to stop: one small file a policy.

Every module in this package is imported on first use of the package, so that a new
policy file registers itself without being named anywhere else.
"""

import importlib
import pkgutil

from refreekv.policies.base import LayerView, Policy, ProbePlan
from refreekv.policies.joint import JointPolicy, LayerScores
from refreekv.policies.registry import available, create, get, parse, register, resolve

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "JointPolicy",
    "LayerScores",
    "LayerView",
    "Policy",
    "ProbePlan",
    "available",
    "create",
    "get",
    "parse",
    "register",
    "resolve",
]
