"""What a model's weights take, from its checkpoint's index or from its shapes."""

from dataclasses import dataclass, replace
from typing import Any

from refreekv.planner.geometry import skeleton
from refreekv.planner.source import Model, ModelError, once_for_each

BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.5}
"""Bits of a weight in matrix products. int4: with one float32 scale for 64 weights, as bitsandbytes stores NF4."""


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights, and where the number is from."""

    bytes: int  # all of them: every expert of a mixture, tied embeddings once
    parameters: int  # their number, from the model's shapes
    form: str  # ``"bf16"``, ``"int8"``, ``"int4"``, or ``"checkpoint"`` for as it is stored
    source: str  # where it is from, in words


@dataclass(frozen=True)
class Counts:
    """Parameters of a model."""

    matrices: int  # in matrix products of the layers, experts included: what quantisation makes smaller
    others: int  # embeddings, the output head, norms, biases: in 16 bits in any case
    experts: int = 0  # those of the matrices that belong to experts, of which a token uses a few
    shapes: tuple[tuple[int, int], ...] = ()  # rows and columns of these matrices, none twice
    partial: bool = False  # whether the language model alone was counted, as its other parts could not be built here

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.others

    def active(self, text: Any) -> float:
        """Parameters that one token is multiplied with; experts count by how many it is sent to."""
        chosen = getattr(text, "num_experts_per_tok", None) or 0
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        experts = next((n for name in names if isinstance(n := getattr(text, name, None), int) and n > 0), 0)
        share = min(1.0, chosen / experts) if experts and chosen else 1.0
        return self.matrices - self.experts * (1 - share) + float(text.vocab_size * text.hidden_size)


def count(model: Model) -> Counts:
    """Parameters by use, of the whole model, image and audio parts included.

    Raises
    ------
    ModelError
        A model that transformers cannot build.
    """
    try:
        return _count(model.config)
    except Exception as error:
        if model.text is model.config:
            raise ModelError(f"transformers cannot build {model.name}: {error}") from error
        return replace(_count(model.text), partial=True)


@once_for_each
def _count(config: Any) -> Counts:
    import torch
    from transformers.pytorch_utils import Conv1D

    built = skeleton(config)
    head = getattr(built, "get_output_embeddings", lambda: None)()
    linears = [m for m in built.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    quantised = {id(module.weight) for module in linears}
    shapes = {
        (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
        for module in linears
        for shape in [module.weight.shape]
    }
    parameters: dict[int, Any] = {}
    experts = 0
    for name, parameter in built.named_parameters():
        parameters[id(parameter)] = parameter
        if ".experts." in name and parameter.dim() == 3:
            quantised.add(id(parameter))
            experts += parameter.numel()
    if head is not None:
        quantised -= {id(parameter) for parameter in head.parameters()}  # also where it is tied
    matrices = sum(parameter.numel() for key, parameter in parameters.items() if key in quantised)
    everything = sum(parameter.numel() for parameter in parameters.values())
    return Counts(matrices, everything - matrices, experts, tuple(sorted(shapes)))


def weigh(model: Model, form: str | None, counts: Counts) -> Weights:
    """Bytes of the weights in a form; None: as the checkpoint stores them, or else as its configuration says.

    Raises
    ------
    ValueError
        Unknown form.
    """
    if form is not None and form not in BITS:
        raise ValueError(f"weights must be one of {', '.join(BITS)}, got {form!r}")
    if form is None and model.checkpoint_bytes is not None:
        return Weights(model.checkpoint_bytes, counts.total, "checkpoint", f"from {model.checkpoint_source}")
    chosen = form or _stored(model)
    size = counts.matrices * BITS[chosen] / 8 + counts.others * 2
    if chosen == "int8":
        size += counts.matrices / 64  # scales: a row's, at most
    words = "computed from the model's shapes"
    if counts.partial:
        words += ", of the language model alone"
    return Weights(int(size), counts.total, chosen, words)


def packed_matrices(model: Model, weights: Weights, counts: Counts) -> tuple[tuple[int, int], ...]:
    """Rows and columns of matrices in 4 bits, which are unpacked to 16 where more than a few tokens are read.

    bitsandbytes does so matrix by matrix, and in `refreekv.compress` some rows at a time where memory is short; its
    kernels read codes themselves for a few tokens only.
    """
    form = _stored(model) if weights.form == "checkpoint" else weights.form
    return counts.shapes if form == "int4" else ()


def _stored(model: Model) -> str:
    """How the weights of a configuration without a checkpoint are most likely stored."""
    quantisation = model.raw.get("quantization_config")
    if not isinstance(quantisation, dict):
        return "bf16"
    method = str(quantisation.get("quant_method", ""))
    four = quantisation.get("bits") == 4 or quantisation.get("load_in_4bit") or method in ("mxfp4", "awq")
    return "int4" if four else "int8" if quantisation.get("bits") == 8 or method in ("fp8", "fbgemm_fp8") else "bf16"
