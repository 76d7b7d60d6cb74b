"""The floors of the code (CONTRIBUTING.md): each may import what lies below it, and never what lies above."""

import ast
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "refreekv"

ENGINE = ("core", "kernels", "storage", "policies", "pruning", "report", "engines")
BELOW = {
    "core": (),
    "report": (),
    "kernels": ("core",),
    "storage": ("core", "kernels"),
    "policies": ("core", "kernels"),
    "pruning": ("core", "kernels", "storage", "policies", "report"),
    "engines/transformers": ENGINE,
    "serving": (*ENGINE, "engines/transformers"),
    "engines/vllm": (*ENGINE, "engines/vllm/scheduler_side", "engines/vllm/worker_side"),
    "engines/vllm/scheduler_side": (*ENGINE, "engines/vllm"),
    "engines/vllm/worker_side": (*ENGINE, "engines/vllm"),
}
"""What a floor may import of the library. What is not named (evaluation, planner, cli) lies above all of these."""

OUTSIDE = {
    "core": {"torch"},
    "kernels": {"torch", "triton"},
    # Files of what finds no room in memory; and lengths on the host, which no operator of PyTorch has to go through.
    "storage": {"torch", "safetensors", "numpy"},
    "policies": {"torch"},
    "pruning": {"torch"},
}
"""Which packages these floors may import beside the standard library."""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [alias.name for alias in node.names] if node.module in ("refreekv", "refreekv.engines") else [""]
            yield from (f"{node.module}.{name}".rstrip(".") for name in names)


def floor_of(path):
    """``engines/vllm/worker_side/step.py`` to ``engines/vllm/worker_side``."""
    return max(
        (name for name in (*BELOW, "engines") if path == f"{name}.py" or f"{path}/".startswith(f"{name}/")),
        key=len,
        default=path,
    )


def files(floor):
    inside = [path for path in SRC.rglob("*.py") if floor_of(path.relative_to(SRC).as_posix()) == floor]
    assert inside
    return inside


@pytest.mark.parametrize("floor", BELOW)
def test_a_floor_imports_what_lies_below_it(floor):
    for path in files(floor):
        for module in imports(path):
            if module.split(".")[0] == "refreekv":
                assert floor_of(module.partition(".")[2].replace(".", "/")) in (floor, *BELOW[floor]), (
                    f"{path.relative_to(SRC)} imports {module}"
                )


@pytest.mark.parametrize("floor", OUTSIDE)
def test_the_lower_floors_need_torch_alone(floor):
    for path in files(floor):
        found = {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - {"refreekv"}
        assert found <= OUTSIDE[floor], f"{path.relative_to(SRC)} imports {found - OUTSIDE[floor]}"


def test_policies_do_not_ask_where_tensors_are():
    """That is for the functions of `refreekv.kernels`."""
    for path in files("policies"):
        asked = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not asked & {"is_cuda", "is_cpu", "available"}, path.name
