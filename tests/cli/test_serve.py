"""``refreekv serve --engine transformers`` as a command: it starts, answers and ends, and refuses what cannot be."""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from transformers import AutoModelForCausalLM

import refreekv
from helpers.command_line import assert_refused, runner, save_chat_model, words
from refreekv.engines.transformers import identity

SERVE = ("serve", "--engine", "transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture
def run(capsys):
    return runner(capsys)


@contextlib.contextmanager
def server(folder, *options):
    """Run the command; what it said until it serves, its URL, and what it says in the end."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    command = [sys.executable, "-m", "refreekv", *SERVE, str(folder), "--port", "0", *options]
    rest = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if "Serving at" in line:
                    break
            yield "".join(said), re.search(r"http://127\.0\.0\.1:\d+/v1", said[-1]).group(), rest
            process.send_signal(signal.SIGINT)
            rest.append(process.communicate(timeout=60)[1])
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in rest[0]


def test_it_serves_until_it_is_interrupted(folder, tmp_path):
    options = ["--policy", "snapkv:ratio=0.5", "--cache-memory", "0", "--cache-folder", str(tmp_path)]
    with server(folder, *options) as (said, url, _):
        assert "snapkv:ratio=0.5" in said
        body = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 3}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
        assert answer["model"] == "chatty"
        assert answer["usage"]["completion_tokens"] == 3
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_an_answer_is_told_that_the_server_was_stopped(tmp_path, stream):
    """It ended with a traceback, and with an error of another form or a connection that broke off."""
    body = {"messages": [{"role": "user", "content": "w1 w2"}], "stream": stream}
    folder, got = save_chat_model(tmp_path / "endless", context=100_000), []

    def ask(url):
        got.append(httpx.post(f"{url}/chat/completions", json=body, timeout=60))

    with server(folder) as (_, url, _):
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        while 'refreekv_requests{state="running"} 1.0' not in httpx.get(url.removesuffix("/v1") + "/metrics").text:
            assert asking.is_alive()
    asking.join(60)
    assert "the server was stopped" in got[0].text
    assert got[0].status_code == (200 if stream else 503)


def test_it_serves_with_a_calibration_and_verifies(folder, tmp_path):
    given = {"min_length": 8, "window": 4, "constant": 0.2, "hit": 0.9, "follow": 1, "lost_mass": 0.6, "copying": 0.9}
    steps = ("full", refreekv.policies.create("adaptive", **given).spec)
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = refreekv.Calibration(
        model=identity.described(model), steps=steps, losses=((0.0, 0.001),) * 38, shares=(1.0, 0.5), risk=0.05,
        damage=7.5, kv_dtype=None,
    )  # fmt: skip
    made.save(tmp_path / "made.json")
    with server(folder, "--calibration", str(tmp_path / "made.json"), "--verify", "prompt") as (_, url, _):
        body = {"messages": [{"role": "user", "content": words(60, 1)}], "max_tokens": 3, "temperature": 0}
        said = httpx.post(f"{url}/chat/completions", json=body, timeout=120).json()["refreekv"]
    assert said["policy"] == said["verified"]["policy"] == steps[1]
    assert (said["verified"]["allowed"], said["verified"]["where"], said["verified"]["step"]) == (7.5, "prompt", 0)
    assert len(said["verified"]["tried"]) == 1
    assert said["bytes"] < said["full_bytes"]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--host", "0.0.0.0"], ["--host 0.0.0.0 lets other machines in", "--api-key-file"]),
        (["--host", "0.0.0.0", "--api-key", ""], ["visible ASCII"]),
        (["--api-key", "a b"], ["visible ASCII"]),
        (["--api-key-file", "/no/such/file"], ["cannot read --api-key-file /no/such/file"]),
        (["--api-key-file", "x", "--api-key", "y"], ["exclude each other"]),
        (["--host", "no.such.host.invalid", "--api-key", "k"], ["cannot listen on no.such.host.invalid"]),
        (["--port", "99999"], ["cannot listen on 127.0.0.1, port 99999"]),
        (["--max-context", "many"], ["--max-context 'many'"]),
        (["--cache-memory", "2"], ["--cache-memory '2' has no unit"]),
        (["--cache-disk", "lots"], ["--cache-disk 'lots'"]),
        (["--port", "0", "--policy", "refrekv"], ["did you mean 'refreekv'"]),
        (["--port", "0", "--kv-dtype", "int9"], ["kv_dtype must be"]),
        (["--port", "0", "--verify", "sometimes"], ["verify"]),
        (["--port", "0", "--calibration", "/no/such/file"], ["/no/such/file"]),
        (["--port", "0", "--host-memory", "auto"], ["this model is on cpu"]),
        (["--max-model-len", "5"], ["--engine transformers does not know --max-model-len 5"]),
        (["--dry-run"], ["--dry-run: for --engine vllm only"]),
        (["--layers-per-group", "2"], ["--layers-per-group: for --engine vllm only"]),
    ],
)
def test_what_cannot_be(run, folder, arguments, fragments):
    assert_refused(run(*SERVE, str(folder), *arguments), *fragments)


def test_a_port_that_is_taken(run, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(run(*SERVE, str(folder), "--port", port), f"cannot listen on 127.0.0.1, port {port}")


def test_what_is_missing_is_named(run, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    assert_refused(run(*SERVE, str(folder)), "needs uvicorn", "pip install 'refreekv[serve]'")


def test_engines(run, folder):
    assert_refused(run("serve", "--engine", "tensorflow", str(folder)), "--engine must be vllm or transformers")
    assert_refused(run("serve", str(folder), "--weights", "int4"), "--weights: for --engine transformers only")
    done = run("serve", "some/model", "--dry-run", "--host", "0.0.0.0", "--trust-remote-code", "--max-model-len", "9")
    assert done.out.rstrip().endswith("--max-model-len 9 --host 0.0.0.0 --trust-remote-code")
