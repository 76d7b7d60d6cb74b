"""The local server over HTTP: OpenAI's own client, conversations, dropped connections, garbage, limits, leaks."""

import gc
import json
import socket
import threading

import httpx
import pytest
import torch

import refreekv
from helpers.command_line import save_chat_model, words
from helpers.serving import served, until
from refreekv.cli import loading
from refreekv.engines.transformers.naming import NAME
from refreekv.serving import application, worker
from refreekv.serving.application import Access

openai = pytest.importorskip("openai", reason="needs the extra dev: pip install openai")

FULL = refreekv.policies.create("full")
PRUNING = refreekv.policies.create("snapkv", ratio=0.5, window=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(loading.find(str(save_chat_model(tmp_path_factory.mktemp("models") / "chatty"))))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A model that ends its answers by itself."""
    return loading.load(loading.find(str(save_chat_model(tmp_path_factory.mktemp("models") / "ending", end=True))))


@pytest.fixture(scope="module")
def running(loaded, tmp_path_factory):
    with served(loaded, FULL, folder=tmp_path_factory.mktemp("files")) as one:
        yield one


@pytest.fixture
def tiny(running):
    """The server, with nothing kept of other tests."""
    running.idle()
    running.conversations.clear()
    return running


def client(server, key="none"):
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60)


def user(text):
    return [{"role": "user", "content": text}]


def tokens_of(loaded, messages):
    text = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(loaded, messages, count, policy=FULL):
    """What the model answers by itself."""
    ids = torch.tensor([tokens_of(loaded, messages)])
    cache = refreekv.ReFreeKVCache(loaded.model, policy)
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **{NAME: cache}
    )
    return loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def caches():
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is refreekv.ReFreeKVCache]


def raw(server, text: bytes) -> bytes:
    """What the server answers to bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(65536)


# -- OpenAI's client -------------------------------------------------------------------------------


def test_an_answer_is_the_models(tiny, loaded):
    done = client(tiny).chat.completions.create(model="tiny", messages=user(words(20, 1)), max_tokens=9, temperature=0)
    assert done.choices[0].message.content == greedy(loaded, user(words(20, 1)), 9)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (23, 9, 32)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    assert done.model_extra["refreekv"]["policy"] == "full"


def test_a_stream_gives_the_same_text(tiny, loaded):
    asked = {"model": "tiny", "messages": user(words(20, 1)), "max_tokens": 9, "temperature": 0}
    pieces = list(client(tiny).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == greedy(loaded, user(words(20, 1)), 9)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices] == [None] * (len(pieces) - 2) + [
        "length"
    ]
    assert len(pieces) > 9  # one for each word: they came as they were made
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == 9


def test_answers_that_end_by_themselves(ending):
    with served(ending, FULL) as server:
        asked = {"model": "tiny", "messages": user(words(20, 1)), "temperature": 0}
        done = client(server).chat.completions.create(**asked)
        assert done.choices[0].finish_reason == "stop"
        pieces = list(client(server).chat.completions.create(**asked, stream=True))
        assert pieces[-1].choices[0].finish_reason == "stop"
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == done.choices[0].message.content
        assert greedy(ending, user(words(20, 1)), 40).startswith(text)


def test_plain_completions(tiny, loaded):
    ids = loaded.tokenizer(words(20, 2))["input_ids"]
    output = loaded.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    wanted = loaded.tokenizer.decode(output[0, 20:])
    for prompt in (words(20, 2), [words(20, 2)], ids):
        done = client(tiny).completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert done.choices[0].text == wanted
    pieces = client(tiny).completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted
    assert client(tiny).completions.create(model="tiny", prompt=ids).usage.completion_tokens == 16


def test_models(tiny):
    (model,) = client(tiny).models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 4096)
    assert client(tiny).models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, but 'tiny'"):
        client(tiny).models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client(tiny).chat.completions.create(model="other", messages=user("w1"))


def test_stop_texts_end_an_answer(tiny, loaded):
    whole = greedy(loaded, user(words(20, 1)), 9)
    stop = whole.split()[4]
    asked = {"model": "tiny", "messages": user(words(20, 1)), "max_tokens": 9, "temperature": 0, "stop": [stop]}
    done = client(tiny).chat.completions.create(**asked)
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    pieces = list(client(tiny).chat.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole[: whole.index(stop)]


def test_sampling(tiny, loaded):
    def text(**options):
        asked = {"model": "tiny", "messages": user(words(20, 1)), "max_tokens": 9, **options}
        return client(tiny).chat.completions.create(**asked).choices[0].message.content

    assert text(temperature=1.5, seed=3) == text(temperature=1.5, seed=3)
    assert len({text(temperature=2, seed=seed) for seed in range(4)}) > 1
    greedily = greedy(loaded, user(words(20, 1)), 9)
    assert text() == greedily  # as the model's own settings say
    assert text(temperature=2, extra_body={"top_k": 1}) == greedily
    assert text(temperature=2, top_p=1e-6) == greedily


def test_system_prompts_parts_and_developers(tiny, loaded):
    messages = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": "w1 w2 w3"}]
    wanted = greedy(loaded, messages, 5)
    parts = [{"type": "text", "text": "w1 w2 "}, {"type": "text", "text": "w3"}]
    asked = [{"role": "developer", "content": "w5 w6"}, {"role": "user", "content": parts}]
    done = client(tiny).chat.completions.create(model="tiny", messages=asked, max_tokens=5, temperature=0)
    assert done.choices[0].message.content == wanted


# -- conversations ---------------------------------------------------------------------------------


def talk(server, message, past=(), count=6):
    """One turn; the conversation after it, and the response."""
    messages = [*past, {"role": "user", "content": message}]
    done = client(server).chat.completions.create(model="tiny", messages=messages, max_tokens=count, temperature=0)
    return [*messages, {"role": "assistant", "content": done.choices[0].message.content}], done


def test_a_turn_reads_what_is_new_alone(tiny, loaded):
    talked, _ = talk(tiny, words(30, 1))
    longer, done = talk(tiny, words(10, 2), talked)
    # All of the first turn but the last token of its answer, which nobody has fed.
    assert done.usage.prompt_tokens_details.cached_tokens == 33 + 6 - 1
    assert longer[-1]["content"] == greedy(loaded, longer[:-1], 6)


def test_a_turn_on_a_pruned_cache_is_that_of_chat(loaded):
    from refreekv.cli.conversation import Conversation, Sampling

    chat = Conversation(loaded, PRUNING, max_new_tokens=6, sampling=Sampling(temperature=0))
    wanted = [chat.say(words(size, size)) for size in (40, 20, 12)]
    with served(loaded, PRUNING) as server:
        past = []
        for turn, size in zip(wanted, (40, 20, 12), strict=True):
            past, done = talk(server, words(size, size), past)
            assert past[-1]["content"] == turn.answer
            assert done.model_extra["refreekv"]["bytes"] == turn.report.bytes_after
            assert done.model_extra["refreekv"]["kept_share"] < 1


def test_two_conversations_at_once(tiny, loaded):
    messages = {seed: user(words(40, seed)) for seed in (1, 2)}
    wanted = {seed: greedy(loaded, messages[seed], 30) for seed in messages}
    texts, together = {}, threading.Barrier(2)

    def ask(seed):
        together.wait()
        asked = {"model": "tiny", "messages": messages[seed], "max_tokens": 30, "temperature": 0, "stream": True}
        texts[seed] = "".join(p.choices[0].delta.content or "" for p in client(tiny).chat.completions.create(**asked))
        longer = [*messages[seed], {"role": "assistant", "content": texts[seed]}, *user("w7 w8")]
        again = client(tiny).chat.completions.create(model="tiny", messages=longer, max_tokens=4, temperature=0)
        assert again.usage.prompt_tokens_details.cached_tokens == 43 + 29
        assert again.choices[0].message.content == greedy(loaded, longer, 4)

    failed = []

    def guarded(seed):
        try:
            ask(seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert texts == wanted
    assert tiny.conversations.count(in_memory=True) == 2


def test_conversations_come_back_from_their_files(loaded, tmp_path):
    with served(loaded, PRUNING, folder=tmp_path, memory_limit=0) as server:
        talks = [talk(server, words(40, seed))[0] for seed in (1, 2, 3)]
        assert server.conversations.memory_bytes == 0
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3
        from_file = [talk(server, words(9, 4), past)[1] for past in talks]
        assert all(done.usage.prompt_tokens_details.cached_tokens == 43 + 5 for done in from_file)
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []  # nothing of a conversation is left behind
    with served(loaded, PRUNING) as server:
        for past, done in zip(talks, from_file, strict=True):
            talk(server, past[0]["content"])
            assert talk(server, words(9, 4), past)[1].choices[0].message.content == done.choices[0].message.content


# -- dropped connections ---------------------------------------------------------------------------


def drop_after(server, body, lines):
    """Leave a stream after so many lines."""
    with httpx.stream("POST", f"{server.url}/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for number, _ in enumerate(response.iter_lines()):
            if number == lines:
                break


def test_a_dropped_stream_stops_and_frees_its_memory(tiny):
    body = {"messages": user(words(30, 1)), "max_tokens": 3000, "stream": True, "temperature": 0}
    before = tiny.worker.counts.answer_tokens
    drop_after(tiny, body, 12)
    tiny.idle()
    made = tiny.worker.counts.answer_tokens - before
    assert 3 <= made < 2000
    assert tiny.worker.counts.outcomes["cancelled"] >= 1
    assert tiny.conversations.memory_bytes == 0
    # Its conversation is in a file, for who only pressed "stop".
    assert tiny.conversations.count(in_memory=False) == 1
    assert talk(tiny, words(30, 1), count=3)[1].usage.prompt_tokens_details.cached_tokens == 32


def test_a_dropped_request_without_a_stream_stops(tiny):
    body = {"messages": user(words(30, 1)), "max_tokens": 3000, "temperature": 0}
    before = tiny.worker.counts.answer_tokens
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tiny.url}/chat/completions", json=body, timeout=0.3)
    tiny.idle()
    assert tiny.worker.counts.answer_tokens - before < 2000


def test_a_request_that_is_dropped_while_it_waits_is_never_begun(tiny):
    slow = threading.Thread(
        target=lambda: tiny.post("chat/completions", {"messages": user("w1"), "max_tokens": 400, "temperature": 0})
    )
    slow.start()
    until(lambda: tiny.worker.running == 1)
    before = tiny.worker.counts.prompt_tokens
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tiny.url}/chat/completions", json={"messages": user(words(99, 1))}, timeout=0.1)
    slow.join()
    tiny.idle()
    assert tiny.worker.counts.prompt_tokens - before == 4


def test_a_prompt_that_is_being_read_can_be_dropped(loaded, monkeypatch):
    with served(loaded, FULL, chunk=16) as server:
        talked, _ = talk(server, words(30, 1))
        reading, go = threading.Event(), threading.Event()
        original = worker.read

        def slow(model, cache, prompt, device, chunk, listener):
            def on_read(done, total):
                reading.set()
                assert go.wait(30)

            told = worker.Listener(on_read, listener.on_text, listener.stopped)
            return original(model, cache, prompt, device, chunk, told)

        monkeypatch.setattr(worker, "read", slow)
        body = {"messages": [*talked, *user(words(200, 2))], "max_tokens": 3}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/chat/completions", json=body, timeout=0.3)
        assert reading.is_set()
        until(lambda: any(job.is_cancelled() for job in list(server.worker._jobs)))
        go.set()
        server.idle()
        monkeypatch.undo()
        assert server.worker.counts.outcomes["cancelled"] == 1
        # What was there before is there again.
        assert talk(server, words(5, 3), talked)[1].usage.prompt_tokens_details.cached_tokens == 33 + 5


# -- what is refused -------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long(tiny):
    with pytest.raises(openai.BadRequestError, match=r"the prompt has 5,003 tokens.*may have 4,096") as error:
        client(tiny).chat.completions.create(model="tiny", messages=user(words(5000, 1)))
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="4,096"):
        client(tiny).chat.completions.create(model="tiny", messages=user(words(5000, 1)), stream=True)
    assert talk(tiny, "w1")[1].choices[0].finish_reason == "length"


def test_an_answer_ends_where_the_context_does(loaded):
    with served(loaded, FULL, context=40) as server:
        done = talk(server, words(30, 1), count=100)[1]
        assert done.usage.total_tokens == 40
        assert done.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "w1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text (image_url)"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "a stop text is empty"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"n": 2}, "n must be 1"),
        ({"logprobs": True}, "logprobs are not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias is not supported"),
        ({"tools": [{"type": "function"}]}, "tools are not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format must be text"),
    ],
)
def test_bad_values(tiny, changes, fragment):
    body = json.dumps({"messages": user("w1"), "max_tokens": 2, **changes})
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{tiny.url}/chat/completions", content=body, headers=headers, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert fragment in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_front_ends_send_along_is_no_hindrance(tiny):
    extra = {"user": "me", "frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "logit_bias": {}, "tools": []}
    answer = tiny.post("chat/completions", {"messages": user("w1"), "max_tokens": 2, "session_id": 4, **extra})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body", [{"prompt": ""}, {"prompt": []}, {"prompt": [5, 10**6]}, {"prompt": [-1]}, {"prompt": ["a", "b"]}, {}]
)
def test_bad_prompts(tiny, body):
    assert tiny.post("completions", body).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"42",
        b"\xff\xfe\x00",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"a":' * 9_999,
        b"\0" * 99,
    ],
    ids=range(10),
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_garbage_is_refused_and_the_server_lives_on(tiny, path, body):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{tiny.url}/{path}", content=body, headers=headers, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert httpx.get(f"{tiny.root}/health").json() == {"status": "ok"}


def test_garbage_that_is_no_http(tiny):
    for text in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n\r\n", b"\r\n" * 50):
        raw(tiny, text)
    body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in raw(tiny, body + b"Content-Length: 99999999999\r\n\r\n{")
    raw(tiny, body + b"Content-Length: 500\r\n\r\n{")  # and no more comes
    assert talk(tiny, "w1")[1].choices


def test_bodies_that_are_too_large_also_in_pieces(tiny, monkeypatch):
    monkeypatch.setattr(application, "MOST_BYTES", 1000)
    headers = {"Content-Type": "application/json"}
    for content in (b" " * 2000, (b" " * 500 for _ in range(4))):
        answer = httpx.post(f"{tiny.url}/completions", content=content, headers=headers)
        assert answer.status_code == 413
    assert httpx.get(f"{tiny.url}/nothing").status_code == 404
    assert httpx.get(f"{tiny.url}/completions").status_code == 405


def test_a_template_that_refuses(tiny, loaded, monkeypatch):
    template = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}w1"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    answer = tiny.post("chat/completions", {"messages": [*user("w1"), *user("w2")]})
    assert answer.status_code == 400
    assert "does not take these messages: one message only" in answer.json()["error"]["message"]
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    answer = tiny.post("chat/completions", {"messages": user("w1")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_too_many_requests(tiny, monkeypatch):
    monkeypatch.setattr(worker, "MOST_WAITING", 0)
    with pytest.raises(openai.RateLimitError, match="0 requests wait already"):
        client(tiny).chat.completions.create(model="tiny", messages=user("w1"))


# -- who may ask -----------------------------------------------------------------------------------


def test_a_key(loaded):
    with served(loaded, FULL, access=Access("secret")) as server:
        assert httpx.get(f"{server.root}/health").status_code == 200
        for path in (f"{server.url}/models", f"{server.root}/metrics"):
            assert httpx.get(path).status_code == 401
            assert httpx.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(path, headers={"Authorization": "secret"}).status_code == 401
            assert httpx.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        with pytest.raises(openai.AuthenticationError, match="an API key is needed"):
            client(server, "guess").models.list()
        assert client(server, "secret").models.list().data


def test_pages_of_the_web_get_nothing(tiny, loaded):
    # Names that are made to lead to this machine, and bodies that browsers send unasked.
    assert httpx.get(f"{tiny.url}/models", headers={"Host": "evil.example:80"}).status_code == 403
    assert httpx.get(f"{tiny.url}/models", headers={"Host": "[::1]:80"}).status_code == 200
    body = json.dumps({"messages": user("w1")})
    headers = {"Content-Type": "text/plain", "Origin": "https://evil.example"}
    assert httpx.post(f"{tiny.url}/chat/completions", content=body, headers=headers).status_code == 415
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{tiny.url}/models", headers=asked).headers
    with served(loaded, FULL, access=Access(origins=("http://localhost:3000",))) as server:
        answer = httpx.options(f"{server.url}/chat/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        other = httpx.options(f"{server.url}/models", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


# -- out of memory, and other faults ---------------------------------------------------------------


def failing(monkeypatch, error, times=10**9):
    """Let generating fail so many times."""
    original, left = worker.generate, [times]

    def generate(*args):
        if left[0]:
            left[0] -= 1
            raise error
        return original(*args)

    monkeypatch.setattr(worker, "generate", generate)


def test_out_of_memory_is_answered_and_the_server_lives_on(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
        for stream in (False, True):
            with pytest.raises(
                openai.APIStatusError, match="memory of cpu is not enough for a conversation of 33"
            ) as e:
                client(tiny).chat.completions.create(model="tiny", messages=user(words(30, 1)), stream=stream)
            assert (e.value.status_code, e.value.code) == (413, "out_of_memory")
    assert httpx.get(f"{tiny.root}/health").status_code == 200
    assert tiny.conversations.memory_bytes == 0
    assert talk(tiny, words(30, 1))[1].usage.completion_tokens == 6


def test_out_of_memory_makes_room_of_other_conversations_and_tries_again(tiny, loaded, monkeypatch):
    past, _ = talk(tiny, words(40, 2))
    failing(monkeypatch, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), times=1)
    talked, _ = talk(tiny, words(30, 1))
    assert talked[-1]["content"] == greedy(loaded, talked[:-1], 6)
    assert tiny.conversations.count(in_memory=False) == 1
    assert talk(tiny, "w4", past)[1].usage.prompt_tokens_details.cached_tokens == 48


def test_out_of_memory_in_the_middle_of_a_stream_ends_it_with_an_error(tiny, monkeypatch):
    original = worker.generate

    def generate(model, tokenizer, cache, prompt, device, settings, listener):
        def on_text(text, tokens, seconds):
            listener.on_text(text, tokens, seconds)
            if tokens == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return original(model, tokenizer, cache, prompt, device, settings, worker.Listener(on_text=on_text))

    monkeypatch.setattr(worker, "generate", generate)
    texts = []
    pieces = client(tiny).chat.completions.create(model="tiny", messages=user("w1 w2"), stream=True)
    with pytest.raises(openai.APIError, match="memory of cpu is not enough"):
        texts.extend(piece.choices[0].delta.content or "" for piece in pieces)
    assert len("".join(texts).split()) == 4


def test_other_faults_are_answered_and_logged(tiny, monkeypatch, caplog):
    failing(monkeypatch, RuntimeError("shapes do not fit\nand more"), times=1)
    with pytest.raises(openai.InternalServerError, match="RuntimeError: shapes do not fit") as error:
        client(tiny).chat.completions.create(model="tiny", messages=user("w1"))
    assert "and more" not in str(error.value)
    assert "a request of 4 tokens failed" in caplog.text
    assert talk(tiny, "w1")[1].choices


def test_a_device_that_failed_is_said(loaded, monkeypatch):
    with served(loaded, FULL) as server:
        failing(monkeypatch, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), times=1)
        for _ in range(2):
            assert server.post("chat/completions", {"messages": user("w1")}).status_code == 503
        health = httpx.get(f"{server.root}/health")
        assert health.status_code == 503
        assert "only a new start helps" in health.json()["error"]["message"]


# -- metrics, and leaks ----------------------------------------------------------------------------


def metrics(server):
    text = httpx.get(f"{server.root}/metrics").text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics(loaded):
    with served(loaded, PRUNING) as server:
        assert metrics(server)["refreekv_weight_bytes"] == 12345
        past, _ = talk(server, words(40, 1))
        talk(server, words(10, 2), past)
        found = metrics(server)
        report = server.worker.counts.latest
        assert found["refreekv_latest_kept_share"] == pytest.approx(report.budget)
        assert found["refreekv_latest_cache_bytes"] == report.bytes_after
        assert found["refreekv_latest_full_cache_bytes"] == report.bytes_before > report.bytes_after
        assert found["refreekv_latest_tokens_per_second"] > 0
        assert found['refreekv_cache_bytes{place="memory"}'] >= report.bytes_after
        assert found['refreekv_conversations{place="memory"}'] == 1
        assert found["refreekv_reused_tokens_total"] == 48
        assert found["refreekv_answer_tokens_total"] == 12
        assert found['refreekv_outcomes_total{outcome="length"}'] == 2
        assert found['refreekv_requests{state="running"}'] == 0


def test_what_is_evicted_is_kept_and_said(loaded):
    with served(loaded, PRUNING, keep_evicted=refreekv.HostStore()) as server:
        past, _ = talk(server, words(40, 1))
        assert "refreekv_latest_restored" not in metrics(server)
        talk(server, words(10, 2), past)
        found, report = metrics(server), server.worker.counts.latest
        assert report.remembered.restored
        assert found["refreekv_latest_restored"] == 1
        assert found['refreekv_evicted_bytes{place="memory"}'] >= report.remembered.host_bytes > 0
        assert found['refreekv_evicted_bytes{place="disk"}'] == 0


def test_fifty_requests_leave_nothing_behind(loaded, tmp_path):
    """Good ones, bad ones and dropped ones: caches, jobs, files and the model are as before."""
    before, own = len(caches()), set(vars(loaded.model))
    with served(loaded, PRUNING, folder=tmp_path, memory_limit=40_000) as server:
        for number in range(50):
            messages = user(words(20 + number, number))
            if number % 5 == 3:
                server.post("chat/completions", {"messages": messages, "temperature": 9})
            elif number % 5 == 4:
                drop_after(server, {"messages": messages, "max_tokens": 500, "stream": True}, 3)
            else:
                server.post("chat/completions", {"messages": messages, "max_tokens": 3, "stream": number % 2 == 0})
        server.idle()
        assert sum(server.worker.counts.outcomes.values()) == 40
        assert server.conversations.memory_bytes <= 40_000
        assert len(caches()) - before == server.conversations.count(in_memory=True)
        assert server.conversations.count(in_memory=True) < 10
        server.conversations.clear()
        assert len(caches()) == before
        assert not any(type(one) is worker.Job for one in gc.get_objects())
        assert server.worker._jobs == set()
    assert set(vars(loaded.model)) == own  # attached no more
    assert list(tmp_path.iterdir()) == []
