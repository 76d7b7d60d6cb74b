"""The HTTP server, started as a user would, driven by the official client."""

import concurrent.futures
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")
openai = pytest.importorskip("openai", reason="needs the openai client: make test-vllm installs it")

from helpers.vllm_engine import story  # noqa: E402


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Base URL and log file of a running `refreekv serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "refreekv", "serve", str(folder), "--policy", "refreekv:threshold=0.02"]
    command += ["--log-requests"]
    command += ["--served-model-name", "smol", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--block-size", "32", "--enforce-eager", "--kv-cache-memory-bytes", "256M"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()
            process.wait(60)


def _wait(url, process, log, seconds=240):
    for _ in range(seconds):
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=120, max_retries=0)


def ask(client, seed, sentences=11, **more):
    messages = [{"role": "user", "content": story(seed, sentences) + " Who bought what?"}]
    return client.chat.completions.create(
        model="smol", messages=messages, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}, **more
    )


def test_chat_reports_what_was_kept(client):
    answer = ask(client, 1)
    assert answer.usage.completion_tokens == 12
    report = answer.model_extra["kv_transfer_params"]["refreekv"]
    assert report["prompt_tokens"] == answer.usage.prompt_tokens > 300
    assert 0 < report["selected_share"] <= report["kept_share"] < 1
    assert report["blocks_freed"] > 0
    assert 0 < report["metric"] <= 0.02


def test_streaming_says_the_same(client):
    whole = ask(client, 2).choices[0].message.content
    chunks = list(ask(client, 2, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert len(chunks) > 6


def test_concurrent(client):
    seeds = range(10, 14)
    alone = [ask(client, seed).choices[0].message.content for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: ask(client, seed).choices[0].message.content, seeds))
    assert together == alone


def test_bad_requests_and_after(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError):
        ask(client, 3, sentences=400)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smol", messages=[{"role": "user", "content": "hi"}], max_tokens=-1)
    with ask(client, 4, stream=True) as stream:  # a client that goes away
        next(iter(stream))
    assert ask(client, 4).usage.completion_tokens == 12


def test_streamed_requests_are_logged(client, server):
    before = server[1].read_text()
    *_, last = ask(client, 40, stream=True, stream_options={"include_usage": True})
    time.sleep(1)
    # Another test's client that went away may have ended later than this began.
    lines = [line for line in server[1].read_text()[len(before) :].splitlines() if "kept_share" in line]
    (line,) = [line for line in lines if last.id in line]
    assert f"'prompt_tokens': {last.usage.prompt_tokens}" in line


def test_metrics(client, server):
    before = _series(server)
    answer = ask(client, 50)
    time.sleep(1)
    after = _series(server)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["pruned_requests_total"] == gained["kept_share_count"] == 1
    assert gained["prompt_tokens_total"] == answer.usage.prompt_tokens
    freed = answer.model_extra["kv_transfer_params"]["refreekv"]["blocks_freed"]
    assert gained["blocks_returned_total"] == freed > 0
    assert gained["metric_sum"] > 0
    assert not any(count for name, count in gained.items() if name.startswith("refusals"))


def test_refusals_are_counted_by_reason(client, server):
    before = _series(server)
    client.completions.create(model="smol", prompt="One word", max_tokens=4)  # less than a block
    client.completions.create(model="smol", prompt=story(60, 11), max_tokens=1)  # ends with its prompt
    time.sleep(1)
    after = _series(server)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["refusals_total:ended"] == 1
    assert gained["refusals_total:policy"] + gained["refusals_total:rounding"] == 1
    assert gained["pruned_requests_total"] == gained["blocks_returned_total"] == 0


def _series(server):
    """Our series from /metrics by name, and by reason where they have one."""
    with urllib.request.urlopen(f"{server[0]}/metrics") as response:
        text = response.read().decode()
    found = re.findall(r"^vllm:refreekv_(\w+)\{([^}]*)\} (\S+)$", text, re.M)
    reasons = [re.search(r'reason="(\w+)"', labels) for _, labels, _ in found]
    return {
        name + (f":{reason[1]}" if reason else ""): float(value)
        for (name, _, value), reason in zip(found, reasons, strict=True)
        if not name.endswith("_created")
    }
