"""The real vLLM: it says what the embedded engine says, with the weights that it was given last, beside the trainer or behind HTTP.

Needs the environment of `make vllm`; without it these tests are skipped.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.harness.bench import ROOT
from tests.harness.distributed import free_port
from tests.harness.tiny import save_tiny
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

BIN = ROOT / ".vllm" / "bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BIN / "ready").exists(), reason="vLLM is not here: `make vllm` installs it in .vllm"
    ),
]
MEMORY = ("--vllm_engine_kwargs", '{"kv_cache_memory_bytes": 134217728}', "--vllm_enforce_eager", "true")
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
HEAD_SIZE = 32  # the smallest that vLLM's attention on CPUs has
# float32 sums in another order, in logarithms of about -6
LOGP_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4  # of gradients, a few Adam steps apart
PLUGIN = """
def brief(completions, **columns):
    return [0.05 * text.count("e") - 0.1 * len(text.split()) for text in completions]
"""


@cache
def folder() -> Path:
    """A run in miniature, and a model of the same shape with other weights; the output layer shares the embedding's weight."""
    folder = temporary_folder()
    make_tiny_run(folder, rows=12, name="llama-tied", head_dim=HEAD_SIZE)
    config = json.loads((folder / "model" / "config.json").read_text())
    sizes = {
        "head_dim": HEAD_SIZE,
        "vocab_size": config["vocab_size"],
        "eos_token_id": config["eos_token_id"],
    }
    save_tiny("llama-tied", folder / "other", seed=1, **sizes)
    (folder / "plugin.py").write_text(PLUGIN)
    return folder


def call(*words: str) -> str:
    """Run a program of the environment and return what it prints."""
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]], cwd=ROOT, env={**os.environ, **SURROUNDINGS, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def serving(*words: str) -> Iterator[int]:
    """Run a server of the model, and yield its port."""
    port = free_port()
    server = subprocess.Popen(
        [str(BIN / "megaswift"), "rollout", "--model", str(folder() / "model"), "--port", str(port), "--vllm_max_model_len",
         "64", *MEMORY, *words],
        cwd=ROOT, env={**os.environ, **SURROUNDINGS, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@cache
def said() -> dict[str, list[dict[str, Any]]]:
    with serving() as port:
        models = str(folder() / "model"), str(folder() / "other")
        text = call(
            "python", "-m", "tests.harness.vllm_trial", *models, "--server", f"http://127.0.0.1:{port}"
        )
    found: dict[str, list[dict[str, Any]]] = json.loads(text.splitlines()[-1])
    return found


@pytest.mark.parametrize("engine", ["colocated", "served"])
@pytest.mark.parametrize("weights", [0, 1], ids=["first weights", "second weights"])
def test_greedy_completions_are_those_of_the_embedded_engine(engine: str, weights: int) -> None:
    assert said()[engine][weights]["greedy"] == said()["embedded"][weights]["greedy"]
    assert said()["embedded"][0]["greedy"] != said()["embedded"][1]["greedy"]
    both = [*said()[engine][0]["greedy"], *said()[engine][1]["greedy"]]
    assert {stopped for _, stopped in both} == {True, False}, "some stop, some are cut"


@pytest.mark.parametrize("engine", ["colocated", "served"])
def test_log_probabilities_are_those_of_the_weights_it_holds(engine: str) -> None:
    assert all(one["logp_fault"] < LOGP_TOLERANCE for one in said()[engine])


def test_the_same_keys_draw_the_same_in_the_trainer_and_behind_http() -> None:
    for colocated, served in zip(said()["colocated"], said()["served"], strict=True):
        assert colocated["sampled"] == served["sampled"]
        assert len({tuple(ids) for ids, _ in colocated["sampled"]}) > 20, "24 completions differ"


TP2 = ("--tensor_model_parallel_size", "2", "--vllm_tensor_parallel_size", "2")
# Without dropout: what is learnt from would be another model than what wrote.
LORA = ("--train_type", "lora", "--lora_alpha", "64", "--lora_dropout", "0")
ALONE = (*LORA, "--vllm_enable_lora", "true")


def learn(name: str, *words: str) -> list[dict[str, float]]:
    """Train for four steps of GRPO with vLLM, far from where the model began, and return the lines of the log."""
    output = folder() / name
    call(
        "megaswift", "rlhf", "--rlhf_type", "grpo", "--model", str(folder() / "model"), "--dataset", str(folder() / "rows.jsonl"),
        "--output_dir", str(output), "--train_iters", "4", "--global_batch_size", "8", "--num_generations", "4",
        "--micro_batch_size", "2", "--max_completion_length", "10", "--max_length", "64", "--learning_rate", "1e-2",
        "--lr_decay_style", "constant", "--external_plugins", str(folder() / "plugin.py"), "--reward_funcs", "brief",
        "--report_to", "none", "--use_vllm", "true", *words,
    )  # fmt: skip
    lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] > 0.1
    return lines


@pytest.mark.parametrize(
    "words",
    [
        ("--nproc_per_node", "1"),
        ("--nproc_per_node", "2", *TP2),
        ("--nproc_per_node", "1", *LORA),
        ("--nproc_per_node", "1", *ALONE),
        ("--nproc_per_node", "1", *ALONE, "--init_weights", "pissa"),
        ("--nproc_per_node", "2", *ALONE, *TP2),
    ],
    ids=["one rank", "tp2", "merged adapter", "adapter", "adapter of twice the rank", "adapter tp2"],
)
def test_vllm_has_the_weights_of_every_step(words: tuple[str, ...]) -> None:
    """The model moves far from where it began, and its probabilities are still those with which vLLM drew."""
    lines = learn(" ".join(words).replace("/", ""), *MEMORY, *words)
    assert all(line["sampling/sampling_logp_difference/mean"] < LOGP_TOLERANCE for line in lines)


def test_servers_take_adapters_alone_and_merged_models_too() -> None:
    """One server for two runs: the second trains in full, and asks for the base model, which it replaces."""
    with serving("--vllm_enable_lora", "true", "--vllm_max_lora_rank", "8") as port:
        server = ("--vllm_mode", "server", "--vllm_server_port", str(port), "--nproc_per_node", "2", "--pp", "2")
        for name, tuner in (("served adapter", LORA), ("served model", ()), ("served again", LORA)):
            lines = learn(name, *server, *tuner)
            assert all(line["sampling/sampling_logp_difference/mean"] < LOGP_TOLERANCE for line in lines), name
        listed = json.loads(urlopen(f"http://127.0.0.1:{port}/v1/models").read())["data"]
        assert [one["id"] for one in listed][1:] == ["megaswift"], "adapters came as they are"


# rlhf_type -> what is learnt from a teacher: its distributions, of what both wrote, or its say in every token
TAUGHT = {
    "gkd": ("--lmbda", "0.5", "--seq_kd", "true", "--gkd_logits_topk", "30", "--sft_alpha", "0.4", "--max_length", "64"),
    "grpo": ("--num_generations", "1", "--beta", "0", "--temperature", "1", "--max_length", "63"),
}  # fmt: skip


@cache
def taught() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Learn from another model, behind a plain `vllm serve` and in memory; return the lines of all runs."""
    port = free_port()
    server = subprocess.Popen(
        [str(BIN / "vllm"), "serve", str(folder() / "other"), "--tokenizer", str(folder() / "model"), "--port", str(port), "--dtype",
         "float32", "--max-model-len", "64", "--max-logprobs", "30", "--enforce-eager", "--kv-cache-memory-bytes", "134217728"],
        cwd=ROOT, env={**os.environ, **SURROUNDINGS}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found = {}
    try:
        for where, teacher in (
            (
                "server",
                ("--teacher_model_server", f"http://127.0.0.1:{port}", "--vllm_server_timeout", "300"),
            ),
            ("memory", ("--teacher_model", str(folder() / "other"))),
        ):
            for kind, more in TAUGHT.items():
                output = folder() / f"{kind} taught by {where}"
                call(
                    "megaswift", "rlhf", "--rlhf_type", kind, "--model", str(folder() / "model"), "--dataset",
                    str(folder() / "rows.jsonl"), "--output_dir", str(output), "--train_iters", "4", "--global_batch_size", "4",
                    "--micro_batch_size", "2", "--max_completion_length", "10", "--learning_rate", "1e-2", "--lr_decay_style",
                    "constant", "--adam_eps", "1e-3", "--top_k", "1", "--seed", "12", "--report_to", "none", *more, *teacher,
                )  # fmt: skip
                lines = (output / "logging.jsonl").read_text().splitlines()
                found[kind, where] = [json.loads(line) for line in lines]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return found


@pytest.mark.parametrize("kind", TAUGHT)
def test_a_teacher_behind_vllm_teaches_and_writes_what_it_does_in_memory(kind: str) -> None:
    if kind == "gkd":
        assert {line["on_policy"] for line in taught()[kind, "memory"]} == {0.0, 1.0}, "choose another seed"
    for line, other in zip(taught()[kind, "server"], taught()[kind, "memory"], strict=True):
        assert line.keys() == other.keys()
        figures = {"loss", "sft_loss", "teacher_kl", "loss_tokens", "completions/mean_length"}
        for name in line.keys() & figures:
            assert line[name] == pytest.approx(other[name], rel=LOGP_TOLERANCE), name
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=NORM_TOLERANCE)
