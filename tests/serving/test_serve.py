"""`transformers serve` with a converted folder and its own code: clients read what greedy decoding writes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers
from transformers import AutoTokenizer

import alibi_hf
from tests.builders import bloom, tokenizer
from tests.checkpoints.exporting import bend_bias

pytestmark = pytest.mark.slow
PROMPT = "My fellow citizens of the Senate"  # trained on 16 tokens, of one character each
NEW, WAIT = 12, 120  # tokens; seconds, on a machine that does much else
SERVE = "import sys; from transformers.cli.transformers import main; sys.exit(main())"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    source = tokenizer(bloom(root / "source", tie=False, raw={"seq_length": 16, "pad_token_id": 1, "eos_token_id": 0}))
    alibi_hf.convert(source, root / "folder", verify=False)
    return root / "folder"


@pytest.fixture(
    scope="module", params=[[], ["--continuous-batching", "--cb-num-blocks", "8"]], ids=["plain", "batching"]
)
def client(request: pytest.FixtureRequest, folder: Path) -> Iterator[openai.OpenAI]:
    """Return a client of a server in a process of its own, on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--trust-remote-code", "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *request.param]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules"), "NO_PROXY": "127.0.0.1"}
    with (folder.parent / "log").open("w+") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder.parent, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(port, server, folder.parent / "log")
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            server.terminate()
            server.wait(WAIT)


def wait_for(port: int, server: subprocess.Popen[Any], log: Path) -> None:
    """Return once the port answers."""
    for _ in range(WAIT * 4):
        assert server.poll() is None, log.read_text()[-3000:]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.25)
    raise TimeoutError(log.read_text()[-3000:])


@torch.no_grad()
def greedy(folder: Path) -> str:
    """Return what a float64 model writes that reads everything again for every token."""
    read = AutoTokenizer.from_pretrained(folder)
    model = alibi_hf.AlibiForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    prompt = ids = read(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return read.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


def test_completions_and_chats_streamed_or_not(
    client: openai.OpenAI, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(folder)
    asked: dict[str, Any] = {"model": str(folder), "max_tokens": NEW, "temperature": 0}
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    assert client.completions.create(prompt=PROMPT, **asked).choices[0].text == expected
    chat = client.chat.completions.create(messages=messages, **asked)
    assert chat.choices[0].message.content == expected
    pieces = client.completions.create(prompt=PROMPT, stream=True, **asked)
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    deltas = client.chat.completions.create(messages=messages, stream=True, **asked)
    assert "".join(delta.choices[0].delta.content or "" for delta in deltas if delta.choices) == expected
    for factor in (0.0, -1.0):
        bend_bias(monkeypatch, factor)
        assert greedy(folder) != expected
        monkeypatch.undo()


def test_what_looks_up_the_architecture_in_transformers_finds_it(folder: Path) -> None:
    model = transformers.AlibiForCausalLM.from_pretrained(folder)
    assert type(model) is alibi_hf.AlibiForCausalLM
