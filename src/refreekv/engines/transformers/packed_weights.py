""".gguf files as they are: models whose matrices stay in the file's blocks.

transformers unpacks them for most architectures. Here the model is built without data, and each matrix that the file
has in blocks becomes a `PackedLinear` (or, of the embedding, a `PackedEmbedding`), whose codes are the file's. What is
no block (norms, biases) is read as numbers. Only architectures whose conversion is known are read, and all of the
model's weights have to be in the file, in their shapes: anything else is refused.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refreekv import kernels
from refreekv.core.weight_blocks import FORMATS, BlockForm, WeightBlocks, chosen, from_file, unpacked

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Of .gguf files: matrices are as in transformers, but for the rows of Llama's queries and keys."""
ROTATED = ("llama",)
"""Whose queries and keys have the two halves of a rotary pair beside each other."""
ONE_ADDED = ("gemma2", "gemma3")
"""Whose norms are stored with the one that the model adds."""
UNUSED = ("rope_freqs.weight",)
"""Tensors of files that belong to no weight."""


class UnpackableError(Exception):
    """Why a file's weights cannot stay packed; the text completes "because"."""


class _Blocks(nn.Module):
    """A module that holds a matrix in blocks, in buffers that no conversion of types changes."""

    def __init__(self, blocks: WeightBlocks):
        super().__init__()
        self.form: BlockForm = blocks.form
        self.low: Tensor
        self.high: Tensor
        self.scales: Tensor
        self.minima: Tensor
        self.rows: Tensor
        for name, part in zip(WeightBlocks._fields[1:], blocks[1:], strict=True):
            self.register_buffer(name, _as_bits(part))

    @property
    def blocks(self) -> WeightBlocks:
        """The matrix."""
        return WeightBlocks(
            self.form,
            self.low,
            self.high,
            self.scales.view(torch.float16),
            self.minima.view(torch.float16),
            self.rows.view(torch.float32),
        )


class PackedLinear(_Blocks):
    """A linear layer with weights in blocks.

    Parameters
    ----------
    blocks : WeightBlocks
        ``[out_features, in_features]``.
    bias : Tensor, optional
        ``[out_features]``.
    """

    def __init__(self, blocks: WeightBlocks, bias: Tensor | None = None):
        super().__init__(blocks)
        self.out_features, self.in_features = blocks.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``: ``[..., in_features]`` to ``[..., out_features]``."""
        return kernels.block_linear(x, self.blocks, self.bias)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.form.bits}"


class PackedEmbedding(_Blocks):
    """An embedding with weights in blocks.

    Parameters
    ----------
    blocks : WeightBlocks
        ``[num_embeddings, embedding_dim]``.
    dtype : torch.dtype
        Of what is looked up.
    scale : Tensor, optional
        What it is multiplied by, for models that do that there.
    """

    def __init__(self, blocks: WeightBlocks, dtype: torch.dtype, scale: Tensor | None = None):
        super().__init__(blocks)
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.dtype = dtype
        self.embed_scale: Tensor | None
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: ``[...]`` to ``[..., embedding_dim]``."""
        rows = unpacked(chosen(self.blocks, ids.flatten()), self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.dtype)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.form.bits}"


@torch.no_grad()
def load(path: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a model whose matrices are those of a .gguf file, as they are.

    Parameters
    ----------
    path : Path
        The file; its configuration is read by transformers.
    device : device
        Where the model is to be.
    dtype : torch.dtype
        What it computes in.

    Raises
    ------
    UnpackableError
        The file is of an architecture that is not known here, or does not have what the model needs.
    """
    import gguf
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = gguf.GGUFReader(str(path))  # a string, as transformers has it: then it is read once
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in ARCHITECTURES:
        raise UnpackableError(f"files of the architecture {architecture} are not read that way")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    file = _File(reader, architecture, config, device, dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if module is head and config.tie_word_embeddings:
            embedding = model.get_input_embeddings()
            model.set_submodule(name, _tied(embedding))
            continue
        parts = {kind: file.take(name, kind, parameter) for kind, parameter in own.items()}
        _fill(model, name, module, parts, dtype)
    if left := file.left():
        raise UnpackableError(f"the file has tensors that the model does not, such as {left[0]}")
    return model.to(device).eval()


def is_packed(module: nn.Module) -> bool:
    """Whether a module computes with weights in blocks."""
    return isinstance(module, _Blocks)


class _File:
    """Tensors of a file, by the names that transformers has for them."""

    def __init__(self, reader: Any, architecture: str, config: Any, device: torch.device, dtype: torch.dtype):
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture, self._config, self._device, self._dtype = architecture, config, device, dtype

    def take(self, module: str, kind: str, like: Tensor) -> WeightBlocks | Tensor:
        """The weights of a module, in blocks where the file has them so."""
        name = f"{self._names.get_name(module)}.{kind}"
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise UnpackableError(f"the file has no {name} for {module}.{kind}")
        form = tensor.tensor_type.name
        packed = form in FORMATS and like.dim() == 2
        # A copy: the file's own memory cannot be written to, which torch wants to be able to.
        data = torch.from_numpy(tensor.data.copy() if packed else self._numbers(tensor)).to(self._device)
        if self._architecture in ROTATED and (".attn_q." in name or ".attn_k." in name):
            data = data.index_select(0, self._order(len(data), name))
        if not packed:
            if self._architecture in ONE_ADDED and name.endswith("norm.weight"):
                data = data - 1
            _check(name, tuple(data.shape), tuple(like.shape))
            return data.to(self._dtype)
        blocks = from_file(data, form)
        _check(name, blocks.shape, tuple(like.shape))
        return blocks

    def left(self) -> list[str]:
        """Names of tensors that nobody has taken."""
        return [name for name in self._tensors if name not in UNUSED]

    def _numbers(self, tensor: Any) -> Any:
        import gguf
        import numpy as np

        return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    def _order(self, count: int, name: str) -> Tensor:
        """Which of the file's rows comes where: of each head its even rows, then its odd ones."""
        heads = self._config.num_attention_heads if ".attn_q." in name else self._config.num_key_value_heads
        rows = torch.arange(count, device=self._device)
        return rows.view(heads, count // heads // 2, 2).transpose(1, 2).flatten()


def _fill(model: Any, name: str, module: nn.Module, parts: dict[str, Any], dtype: torch.dtype) -> None:
    """Give a module its weights, or put one in its place that has them in blocks."""
    weight = parts.get("weight")
    if not isinstance(weight, WeightBlocks):
        for kind, part in parts.items():
            setattr(module, kind, nn.Parameter(part, requires_grad=False))
        return
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", None)
        model.set_submodule(name, PackedEmbedding(weight, dtype, scale if isinstance(scale, Tensor) else None))
    elif type(module) is nn.Linear:
        model.set_submodule(name, PackedLinear(weight, parts.get("bias")))
    else:
        raise UnpackableError(f"{name} is a {type(module).__name__}")


def _tied(embedding: nn.Module) -> nn.Module:
    """An output layer with the weights of the embedding."""
    if isinstance(embedding, PackedEmbedding):
        layer = PackedLinear(embedding.blocks)
        for name in WeightBlocks._fields[1:]:
            layer.register_buffer(name, getattr(embedding, name))  # the same memory
        return layer
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.weight = embedding.weight  # type: ignore[assignment]
    plain.out_features, plain.in_features = embedding.weight.shape  # type: ignore[misc]
    return plain


def _check(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise UnpackableError(f"{name} has the shape {list(got)} in the file and {list(wanted)} in the model")


def _as_bits(part: Tensor) -> Tensor:
    """Numbers as integers of the same bits: a conversion of the model's type leaves these alone."""
    same: dict[torch.dtype, torch.dtype] = {torch.float16: torch.int16, torch.float32: torch.int32}
    return part.view(same[part.dtype]) if part.dtype in same else part
