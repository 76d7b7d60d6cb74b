"""The local server with ``--verify`` and ``--calibration``: what each answer says of it, and that answers are right."""

import httpx
import pytest

import refreekv
from helpers.command_line import save_chat_model, words
from helpers.serving import served
from refreekv.cli import loading, running
from refreekv.cli.app import UserError
from refreekv.cli.serving import ServeOptions, _application, _Sizes
from refreekv.engines.transformers import identity

pytest.importorskip("fastapi", reason="needs the extra serve: pip install fastapi uvicorn")

FULL = refreekv.policies.create("full")
ADAPTIVE = refreekv.policies.create(
    "adaptive", min_length=8, window=4, constant=0.1, hit=0.9, follow=1, lost_mass=0.6, copying=0.9
)
PRUNING = refreekv.policies.create("snapkv", ratio=0.5, window=4)
STEPS = ("full", ADAPTIVE.spec.replace("0.1", "0.05"), ADAPTIVE.spec)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(loading.find(str(save_chat_model(tmp_path_factory.mktemp("models") / "chatty"))))


def calibration(model, loss):
    """One whose steps all lose ``loss`` nats, but the first."""
    return refreekv.Calibration(
        model=identity.described(model),
        steps=STEPS,
        losses=tuple((0.0, loss, loss) for _ in range(38)),
        shares=(1.0, 0.6, 0.5),
        risk=0.05,
        damage=0.03,
        kv_dtype=None,
        continuation=8,
        refreekv=refreekv.__version__,
    )


def talk(server, size, past=(), **options):
    """One more turn: the messages until then, and what came back."""
    messages = [*past, {"role": "user", "content": words(size, size)}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, **options}
    answer = server.post("chat/completions", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return [*messages, found["choices"][0]["message"]], found["refreekv"]


def test_each_answer_says_what_was_verified(loaded):
    """Strict enough, everything stays and answers are the full cache's; loose enough, the first step passes."""
    texts = {}
    for name, policy, verify in (("full", FULL, False), ("strict", PRUNING, 1e-9), ("loose", PRUNING, 1e9)):
        with served(loaded, policy, verify=verify) as server:
            past, kept = [], []
            for size in (60, 40):
                past, said = talk(server, size, past)
                kept.append(said)
            texts[name] = [message["content"] for message in past if message["role"] == "assistant"]
        if name == "full":
            assert [one["verified"] for one in kept] == [None, None]
            continue
        for one in kept:
            verified = one["verified"]
            assert set(verified) == {"step", "steps", "policy", "allowed", "tried", "tokens", "where", "reason"}
            assert (verified["allowed"], verified["where"], verified["reason"]) == (verify, "prompt", "")
            assert verified["tokens"] > 0
            assert (verified["step"] == verified["steps"] - 1) == (name == "strict")
            assert (one["kept_share"] == 1) == (name == "strict")
            assert (one["bytes"] < one["full_bytes"]) == (name == "loose")
    assert texts["strict"] == texts["full"]


def test_a_step_that_keeps_all_as_it_is_passes_whatever_is_allowed(loaded):
    """`adaptive` a sixteenth as loose keeps a short prompt, none of which is coded: nothing differs. The next is."""
    with served(loaded, ADAPTIVE, verify=1e-9) as server:
        past, first = talk(server, 60)
        _, second = talk(server, 40, past)
    assert first["verified"]["steps"] == second["verified"]["steps"] == 4
    assert first["verified"]["step"] == 2
    assert first["verified"]["tried"][-1] == 0
    assert first["kept_share"] == 1
    # Some of what the next turn brings would be coded: the last step stores it as the model computed it.
    assert second["verified"]["step"] == 3
    assert min(second["verified"]["tried"]) > 1e-9
    assert second["kv_dtype"] is None
    assert second["kept_share"] == 1


def test_a_stream_says_it_too(loaded):
    with served(loaded, ADAPTIVE, verify=1e9) as server:
        body = {"messages": [{"role": "user", "content": words(60, 1)}], "max_tokens": 4, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        lines = server.post("chat/completions", body).text.splitlines()
    said = [line for line in lines if line.startswith("data: {") and '"refreekv"' in line]
    assert len(said) == 1
    assert '"verified":{"step":0' in said[0].replace(" ", "")


@pytest.mark.parametrize("loss", [0.001, 1.0])
def test_a_calibration_says_the_policy_and_the_damage(loaded, tmp_path, loss):
    """Also where it is the full cache that keeps the risk; and it allows what is verified as much as it allows."""
    file = tmp_path / "calibration.json"
    calibration(loaded.model, loss).save(file)
    policy, stored, reading = running.calibrated(
        loaded, refreekv.policies.create("adaptive"), "auto", str(file), verify="prompt"
    )
    assert policy.spec == (STEPS[2] if loss < 0.03 else "full")
    with served(loaded, policy, kv_dtype=stored, verify=reading) as server:
        _, said = talk(server, 60)
    assert said["verified"]["allowed"] == 0.03
    if said["verified"]["step"] == 0:
        assert said["policy"] == policy.spec
    with served(loaded, policy, kv_dtype=stored) as server:
        _, said = talk(server, 60)
    assert (said["policy"], said["verified"]) == (policy.spec, None)


def test_what_a_server_cannot_verify(loaded, tmp_path):
    sizes = _Sizes(None, 2**20, 0)
    with pytest.raises(UserError, match="use --verify prompt"):
        _application(loaded, ServeOptions("adaptive", verify="answer"), sizes, None, local=True)
    other = loading.load(loading.find(str(save_chat_model(tmp_path / "other", num_hidden_layers=1))))
    calibration(other.model, 0.001).save(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"other\.json was made for"):
        _application(
            loaded, ServeOptions("adaptive", calibration=str(tmp_path / "other.json")), sizes, None, local=True
        )
    with pytest.raises(UserError, match="leave --policy and --kv-dtype out"):
        _application(loaded, ServeOptions("full", calibration=str(tmp_path / "other.json")), sizes, None, local=True)


def test_garbage_beside_verification_is_refused_and_the_server_lives_on(loaded):
    with served(loaded, ADAPTIVE, verify=1e9, context=100) as server:
        long = server.post("chat/completions", {"messages": [{"role": "user", "content": words(300, 1)}]})
        assert long.status_code == 400
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/chat/completions", json={"messages": [{"role": "user", "content": words(80, 2)}],
                                                               "max_tokens": 9}, timeout=1e-3)  # fmt: skip
        server.idle()
        _, said = talk(server, 60)
    assert said["verified"]["step"] == 0
