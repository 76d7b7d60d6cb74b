"""A chat of several turns with the server that `refreekv serve` starts: what each turn finds in the prefix cache.

    python benchmarks/vllm_chat.py FOLDER --modes "adaptive adaptive+none full@k6v4"
    python benchmarks/vllm_chat.py FOLDER --modes stock -- --max-model-len 8192

A mode is `stock`, or a policy, how it stores what it keeps behind @, and +none for --no-prefix-hits. Each starts a
server as a user does, waits for it, and asks through the `openai` client: the first question comes with a long text,
the others are short. Of each turn: tokens of the prompt, how many of them were found, milliseconds to the first token
and between tokens, the answer's beginning; then what /metrics says, and what each request kept.
Options behind -- go to the server.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

QUESTIONS = (
    "What did Ada buy, and where?", "Who paid most?", "Which year was that?", "Name three of the places.",
    "Sum it up in one sentence.",
)  # fmt: skip

SHOWN = 60
"""Characters of an answer that are printed."""


def command(folder: str, mode: str, port: int, more: list[str]) -> list[str]:
    """What is run for a mode."""
    own = ["--port", str(port), "--served-model-name", "model", "--enable-prompt-tokens-details", *more]
    if mode == "stock":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--host", "127.0.0.1", *own]
    policy, _, rest = mode.partition("@")
    policy, none = policy.removesuffix("+none"), "+none" in mode
    kind = rest.removesuffix("+none")
    own += ["--policy", policy, "--log-requests"] + (["--kv-dtype", kind] if kind else [])
    return [sys.executable, "-m", "refreekv", "serve", folder, "--host", "127.0.0.1", *own] + [
        "--no-prefix-hits"
    ] * none


def wait_for(port: int, process: Any, log: Path, seconds: float) -> None:
    """Until the server answers."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def turn(client: Any, messages: list[dict[str, str]], tokens: int) -> tuple[str, dict[str, Any]]:
    """One answer, and what it took."""
    begin, times, text, usage = time.perf_counter(), [], "", None
    stream = client.chat.completions.create(
        model="model", messages=messages, max_tokens=tokens, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    details = usage.prompt_tokens_details if usage is not None else None
    return text, {
        "prompt": usage.prompt_tokens if usage is not None else None,
        "found": (details.cached_tokens or 0) if details is not None else 0,
        "first token": round(1000 * (times[0] - begin), 1),
        "between": round(1000 * (times[-1] - times[0]) / max(1, len(times) - 1), 2),
    }


def chat(folder: str, mode: str, options: argparse.Namespace) -> None:
    """Start a server, talk to it and print what came."""
    from openai import OpenAI

    from helpers.vllm_engine import story

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path(options.logs) / f"server-{re.sub('[^a-z0-9]+', '-', mode)}.log"
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command(folder, mode, port, options.more), stdout=out, stderr=subprocess.STDOUT, env=os.environ
        )
    try:
        wait_for(port, process, log, options.wait)
        print(f"{mode}: ready after {time.perf_counter() - started:.0f} s", flush=True)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        turn(client, [{"role": "user", "content": "Hello"}], 8)
        messages = [{"role": "user", "content": story(3, options.sentences) + " " + QUESTIONS[0]}]
        for question in [*QUESTIONS[1:], ""]:
            text, said = turn(client, messages, options.tokens)
            print("  " + json.dumps({**said, "answer": text[:SHOWN]}), flush=True)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            metrics = response.read().decode()
        wanted = r"^(vllm:(?:refreekv_\w+(?:_total|_sum|_count)|prefix_cache_(?:hits|queries)_total))\{[^}]*\} (\S+)$"
        counts: dict[str, float] = {}
        for name, value in re.findall(wanted, metrics, re.M):
            counts[name] = counts.get(name, 0.0) + float(value)
        print("  " + " ".join(f"{name.removeprefix('vllm:')}={value:g}" for name, value in counts.items()), flush=True)
        for line in log.read_text().splitlines():
            if "'kept_share'" in line:
                print("  " + line.split("Request", 1)[-1][:200], flush=True)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    """Talk to the server of each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the model")
    parser.add_argument("--modes", default="adaptive adaptive+none")
    parser.add_argument("--sentences", type=int, default=120, help="of the text that the first question comes with")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--wait", type=float, default=80, help="seconds that a server may take to start")
    parser.add_argument("--logs", default=".", help="a folder for the servers' logs")
    options, more = parser.parse_known_args()
    options.more = [argument for argument in more if argument != "--"]
    for mode in options.modes.split():
        chat(options.folder, mode, options)


if __name__ == "__main__":
    main()
