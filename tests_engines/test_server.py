"""An OpenAI client against ``moefuse serve`` on loopback, as people use it."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from served import Student
from servers import Server, running
from transformers import AutoTokenizer, PreTrainedModel

import moefuse
from moefuse.evaluation.generate import infill_markers

FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")
SPACE = ("--kv-cache-memory-bytes", "268435456", "--max-num-seqs", "16")
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
NAME = "bundled-4"


@pytest.fixture(scope="module")
def path(student: Student) -> Path:
    return student(NAME)


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(["moefuse", "serve", str(path), "--", *FLAGS, *SPACE], log) as started:
        yield started
        # Ctrl-C reaches vLLM, and nothing is left of it.
        assert started.stop(signal.SIGINT) == 0
    assert "/v1 as soon as it is loaded; then try\ncurl http://127.0.0.1:" in log.read_text()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client


@pytest.fixture(scope="module")
def model(path: Path) -> PreTrainedModel:
    return moefuse.load(path, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


def greedy(model: Any, tokenizer: Any, text: str, new: int, *, bos: bool = True) -> str:
    """Return what Transformers writes after ``text``."""
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=bos)
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(client: openai.OpenAI, prompt: str, new: int = 24, **options: Any) -> Any:
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=new, temperature=0, **options
    )


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [listed] = client.models.list().data
    assert listed.id == NAME


def test_completion(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    made = complete(client, "def read_lines(path):\n")

    assert made.choices[0].text == greedy(model, tokenizer, "def read_lines(path):\n", 24)
    assert made.usage.completion_tokens == 24


def test_chat_by_the_checkpoint_s_template(
    client: openai.OpenAI, model: Any, tokenizer: Any
) -> None:
    made = client.chat.completions.create(
        model=NAME,
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=24,
        temperature=0,
    )

    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert made.choices[0].message.content == greedy(model, tokenizer, text, 24, bos=False)
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_streaming_gives_the_same_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "messages": QUESTION}
    whole = client.chat.completions.create(model=NAME, **options)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model=NAME, stream=True, **options)
    ]

    assert len(pieces) > 10
    assert "".join(pieces) == whole.choices[0].message.content


def test_insertion(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    prompt = infill_markers(tokenizer).prompt("def mean(values):\n    ", "\n    return total\n")

    made = complete(client, prompt)

    assert made.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    assert made.choices[0].text == greedy(model, tokenizer, prompt, 24)


@torch.no_grad()
def test_log_probabilities(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    made = complete(client, "import os\n", new=8, logprobs=3)

    inputs = tokenizer("import os\n", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    before = inputs["input_ids"].shape[1]
    log_TV = model(output).logits[0, before - 1 : -1].log_softmax(-1)
    expected_T = log_TV.gather(1, output[0, before:, None])[:, 0]
    found = made.choices[0].logprobs
    torch.testing.assert_close(torch.tensor(found.token_logprobs), expected_T, rtol=1e-4, atol=1e-4)
    assert all(len(likeliest) >= 3 for likeliest in found.top_logprobs)


def test_a_stop_string(client: openai.OpenAI) -> None:
    whole = complete(client, "def read_lines(path):\n", new=48).choices[0].text
    stop = whole[20:23]

    made = complete(client, "def read_lines(path):\n", new=48, stop=[stop]).choices[0]

    assert made.finish_reason == "stop"
    assert made.text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "another"}, 404, "another"),
        ({"max_tokens": 100_000}, 400, "512"),
        ({"temperature": -1}, 400, "temperature"),
        ({"prompt": None}, 400, "prompt"),
    ],
)
def test_bad_requests_are_told_so(
    changes: dict[str, Any], status: int, words: str, server: Server
) -> None:
    asked = {"model": NAME, "prompt": "def main", "max_tokens": 4, "temperature": 0, **changes}

    answer = httpx.post(f"{server.address}/v1/completions", json=asked, timeout=60)

    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_of_64_parallel_requests_none_is_lost(client: openai.OpenAI) -> None:
    prompts = [f"def function_{number}(" + "value, " * (number % 13) for number in range(64)]
    alone = [complete(client, prompt, new=12).choices[0].text for prompt in prompts[:8]]

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt, new=12), prompts))

    assert [made.usage.completion_tokens for made in together] == [12] * 64
    assert [made.choices[0].text for made in together[:8]] == alone


def running_requests(server: Server) -> float:
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith("vllm:num_requests_running")]
    return float(line.split()[-1])


def test_a_client_that_hangs_up_costs_nothing(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model=NAME, prompt="import", stream=True, **options)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert running_requests(server) == 1
    stream.close()

    end = time.monotonic() + 30
    while running_requests(server) and time.monotonic() < end:
        time.sleep(0.1)
    assert running_requests(server) == 0
    assert complete(client, "def main").choices[0].text


def test_vllm_serve_needs_no_flag_and_ends_when_told_to(path: Path, tmp_path: Path) -> None:
    space = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with running(["vllm", "serve", str(path)], tmp_path / "log", **space) as server:
        stream = server.client.completions.create(
            model=str(path),
            prompt="import",
            stream=True,
            max_tokens=1500,
            extra_body={"ignore_eos": True},
        )
        assert next(iter(stream)).choices[0].text is not None
        # vLLM 0.32 stops its engine at once, but may wait for clients to leave before it ends.
        leaving = threading.Timer(5, stream.close)
        leaving.start()

        assert server.stop(signal.SIGTERM) == 0
        leaving.join()


def test_transformers_serves_where_vllm_is_not(
    path: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    without = {"PYTHONPATH": str(Path(__file__).parent / "without_vllm")}
    with running(["moefuse", "serve", str(path)], tmp_path / "log", **without) as server:
        made = server.client.completions.create(
            model=str(path), prompt="import os\n", max_tokens=8, temperature=0
        )
        answer = server.client.chat.completions.create(
            model=str(path),
            messages=QUESTION,  # type: ignore[arg-type]
            max_tokens=8,
        )

        assert made.choices[0].text.strip()
        assert answer.choices[0].message.content
        assert server.stop(signal.SIGINT) == 0
    assert f"Transformers serves {NAME} at" in (tmp_path / "log").read_text()
