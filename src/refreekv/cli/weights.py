"""Weights in 8 and 4 bits, through the libraries that people use for it."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreekv.cli.app import UserError, one_line

if TYPE_CHECKING:
    import torch

WEIGHTS = ("auto", "int8", "int4", "packed", "unpacked")
GGUF_ONLY = ("packed", "unpacked")
INSTALL = "pip install 'refreekv[quant]'"


def check(weights: str, gguf: str | None) -> None:
    """`UserError` for what ``--weights`` cannot be, or cannot be for this model."""
    if weights not in WEIGHTS:
        raise UserError(f"--weights must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    if gguf and weights in ("int8", "int4"):
        raise UserError(
            f"{gguf} is quantised already: leave --weights out, or give --weights packed to keep its weights as "
            "they are"
        )
    if weights in GGUF_ONLY and not gguf:
        raise UserError(f"--weights {weights} is for .gguf files; use int8 or int4")


def quantization_config(weights: str, device: "torch.device", dtype: Any) -> Any:
    """What `from_pretrained` is told, or None for weights as they are.

    On a GPU both widths go through bitsandbytes (LLM.int8() and NF4). On a CPU 8 bits go
    through torchao, which quantises weights only and keeps the model's precision otherwise;
    4 bits are NF4 there too.

    Parameters
    ----------
    weights : str
        ``"auto"``, ``"int8"`` or ``"int4"``.
    device : torch.device
        Where the model is to run.
    dtype : torch.dtype or None
        What 4-bit weights are computed in; None: bfloat16.

    Raises
    ------
    UserError
        The library is not installed.
    """
    if weights not in ("int8", "int4"):
        return None
    library = "torchao" if weights == "int8" and device.type == "cpu" else "bitsandbytes"
    missing = [name for name in (library, "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--weights {weights} on {device.type} needs {' and '.join(missing)}; run: {INSTALL}")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    import torch
    from transformers import BitsAndBytesConfig

    if weights == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
        llm_int8_enable_fp32_cpu_offload=True,
    )


def packed_model(path: Path, weights: str, device: "torch.device", dtype: Any) -> Any:
    """A .gguf file's model with its weights as they are, or why transformers is to load it, as a text.

    It is, unless the user wishes otherwise, and for files that cannot be read that way.
    """
    from refreekv.engines.transformers import packed_weights

    if weights == "unpacked":
        return "as --weights says"
    if weights == "auto" and device.type == "cpu":
        return "on a CPU that is quicker; --weights packed keeps them as they are"
    if weights == "auto":
        # Their kernels were compiled for GPUs and run through the interpreter, and have not been timed on a card.
        return "packed ones are on trial on GPUs; --weights packed keeps them as they are"
    try:
        return packed_weights.load(path, device=device, dtype=dtype)
    except packed_weights.UnpackableError as reason:
        return one_line(reason)


def packed_modules(model: Any) -> int:
    """How many modules of a model compute with a .gguf file's blocks as they are."""
    from refreekv.engines.transformers.packed_weights import is_packed

    names = ("ggml_type", "gate_up_type")  # of transformers' modules
    return sum(is_packed(module) or any(hasattr(module, name) for name in names) for module in model.modules())


def packing(model: Any, path: Path, why: str) -> str:
    """One sentence on what became of a .gguf file's weights, with bytes; ``why`` they were unpacked, if they were."""
    from refreekv.report import format_bytes

    before, now = path.stat().st_size, weight_bytes(model)
    sizes = f"{format_bytes(now)} in memory, {format_bytes(before)} in the file"
    if packed := packed_modules(model):
        return f"{path.name}: weights stay packed in {packed} modules ({sizes})"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{path.name}: weights are unpacked to {dtype} ({sizes}): {why}"


def weight_bytes(model: Any) -> int:
    """Bytes of storage that a model's weights hold on to, wherever they are and however they are packed."""
    sizes: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        # Quantised weights are tensors made of tensors.
        names = getattr(tensor, "tensor_data_names", None)
        for part in [getattr(tensor, name) for name in names] if names else [tensor]:
            if part is not None and part.device.type != "meta":
                storage = part.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
