"""An OpenAI server on a compressed checkpoint, with many clients."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

from exported import of_kind
from served import native, prompts, write

CLIENTS = 32


@pytest.fixture(scope="module")
def exported():
    return of_kind("anchored keys", anchor=16, k_segments=("2x8+4x4",) * 3)


@pytest.fixture(scope="module")
def port(exported, tmp_path_factory):
    folder = write(exported, tmp_path_factory.mktemp("model"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype=float32", "--enforce-eager", "--block-size=16", "--max-model-len=256"]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += [*options, "--served-model-name=low", "--host=127.0.0.1", f"--port={port}"]
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(words, env=env, start_new_session=True)
    try:
        wait(server, port)
        yield port
    finally:
        server.terminate()
        server.wait(30)


def wait(server, port: int) -> None:
    """Until the server answers."""
    while True:
        assert server.poll() is None, "the server has ended"
        time.sleep(0.5)
        try:
            with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as link:
                link.request("GET", "/health")
                if link.getresponse().status == 200:
                    return
        except OSError:
            continue


def stream(port: int, text: list[int], count: int, hang_up: int | None = None) -> list[int]:
    """The tokens that are streamed, up to `hang_up` of them."""
    asked = {"model": "low", "prompt": text, "max_tokens": count, "temperature": 0}
    asked |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as link:
        link.request(
            "POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"}
        )
        answer = link.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
            if hang_up and len(tokens) >= hang_up:
                break
    return tokens


def test_many_clients_are_answered_though_some_hang_up(port, exported):
    texts = prompts([3 + 4 * i for i in range(CLIENTS)])
    with ThreadPoolExecutor(CLIENTS) as pool:
        waits = [
            pool.submit(stream, port, text, 30, hang_up=4 if i % 4 == 3 else None)
            for i, text in enumerate(texts)
        ]
        got = [x.result() for x in waits]
    want = native(exported.model, texts, 30)
    for i in range(CLIENTS):
        if i % 4 == 3:
            assert got[i] == want[i][: len(got[i])]
        else:
            assert got[i] == want[i]
    assert stream(port, texts[5], 30) == want[5]
