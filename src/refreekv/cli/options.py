"""Options that several commands share, each with one spelling and one help text."""

from typing import Annotated

import typer

from refreekv.engines import DEFAULT_POLICY as DEFAULT_POLICY

ModelOption = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="A local folder, a .gguf file, or a model id of the hub.")
]

PromptFileOption = Annotated[
    str | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from this file; - is stdin.")
]

PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy", metavar="NAME[:PARAM=VALUE,…]", help="What decides on what to keep; see `refreekv policies`."
    ),
]

KVDtypeOption = Annotated[
    str,
    typer.Option(
        "--kv-dtype",
        metavar="auto|16|int8|int4|k6v4[:recent=N]",
        help="Store what is kept in so many bits (k6v4: keys in 6, values in 4), but for the 64 newest entries; 16: "
        "as the model computes it; auto: as the policy has it.",
    ),
]

CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What `refreekv calibrate` wrote for this model, in place of --policy and --kv-dtype.",
    ),
]

VerifyOption = Annotated[
    str | None,
    typer.Option(
        "--verify",
        metavar="prompt|answer[:damage=NATS,tokens=N]",
        help="Read the end of each prompt, or the beginning of each answer, again over what was kept, and keep more "
        "where that differs by more than 0.02 nats (or what the calibration says).",
    ),
]

KeepEvictedOption = Annotated[
    str,
    typer.Option(
        "--keep-evicted",
        metavar="auto|host[:limit=SIZE,folder=DIR]|off",
        help="host: what is evicted goes to host memory, in 8 bits, and comes back for the next message, which is read "
        "over everything. At most a quarter of what is free, then DIR if there is one. auto: host on a GPU; off on a "
        "CPU, where it takes the memory that eviction frees, and with --host-memory.",
    ),
]

HostMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        metavar="auto|SIZE",
        help="Hold codes that do not fit on the GPU in the host's memory: those of as many layers as it takes, or as "
        "SIZE (8GiB) holds.",
    ),
]

MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Tokens to generate at most.")]

DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16. auto: as the checkpoint says; for .gguf, float32 on a CPU "
        "and bfloat16 elsewhere.",
    ),
]

DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps … auto: a GPU where there is one.")
]

ChatOption = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Use the chat template or not. Default: if there is one.")
]

WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="auto|int8|int4|packed|unpacked",
        help="int8, int4: quantise the weights while they are loaded (bitsandbytes; int8 on a CPU: torchao). auto: as "
        "they are; those of a .gguf unpacked. packed, unpacked: for .gguf.",
    ),
]

DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="auto",
        help="Let accelerate place the model: GPUs first, what does not fit stays on the CPU.",
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]

TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Off by default.")
]
