"""Tokenising conversations with their loss masks, beside the tokenizer's own batch calls: `make bench-encode`.

    python -m tests.harness.bench_encode [--rows 20000] [--workers 1 2] [--model FOLDER] [--data FILE]

Ours reads samples and gives token ids and loss weights, in so many processes of one thread each. The tokenizer's own calls
run with as many threads: on texts that are rendered already (ids alone, no template, no mask), and as
apply_chat_template on the conversations (ids alone, no mask). Without --data the conversations are cut out of the standard
library's sources. Every figure is the best of three, each in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.harness.bench import BENCH, ROOT
from tests.harness.smollm2 import fetch_smollm2

WAYS = ("ours", "texts", "apply_chat_template")
TRIES = 3


def measure(way: str, model: Path, data: Path, rows: int, workers: int) -> tuple[float, float, int]:
    """Return seconds, CPU seconds and tokens of one call; in a process whose threads are set and that has tokenised nothing
    before, as pieces and words that were seen come out of memory."""
    from megaswift.config.data import DataConfig
    from megaswift.data.encode import encode_samples
    from megaswift.data.read import read_datasets
    from megaswift.data.template import Template
    from megaswift.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    samples = read_datasets(DataConfig(dataset=[f"{data}#{rows}"])).train
    messages = [list(sample.messages) for sample in samples]
    texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in messages] if way == "texts" else []

    template = Template(tokenizer, max_length=8192)  # made before the clock starts, as the tokenizer is

    def ours() -> int:
        return len(encode_samples(samples, template, processes=workers)[0].input_ids)

    def of_texts() -> int:
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def of_conversations() -> int:
        return sum(map(len, tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]))

    call: Callable[[], int] = {"ours": ours, "texts": of_texts, "apply_chat_template": of_conversations}[way]
    began, cpu_began = time.perf_counter(), sum(os.times()[:4])
    tokens = call()
    return time.perf_counter() - began, sum(os.times()[:4]) - cpu_began, tokens


def write_rows(file: Path, rows: int) -> Path:
    """Write conversations of about 600 characters, cut out of Python's own sources."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(path.read_text("utf-8", errors="replace") for path in sources)
    file.parent.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8") as opened:
        for row in range(rows):
            begin = row * 601 % (len(text) - 601)
            question, answer = text[begin : begin + 150], text[begin + 150 : begin + 600]
            opened.write(json.dumps({"query": question, "response": answer}) + "\n")
    return file


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--model", type=Path, default=ROOT / ".demo" / "SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="a file of conversations")
    parser.add_argument("--way", choices=WAYS, help="one measurement, for this program itself")
    options = parser.parse_args()
    model = fetch_smollm2(options.model)
    if options.data is None:
        options.data = write_rows(BENCH / "conversations.jsonl", options.rows)
    if options.way:
        print(*measure(options.way, model, options.data, options.rows, options.workers[0]))
        return
    print("| way | workers | s | CPU s | rows/s | tokens/s |\n|---|--:|--:|--:|--:|--:|")
    for workers in options.workers:
        tries: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
        for _ in range(TRIES):  # in turn: this machine may be slower a minute later
            for way in WAYS:
                tries[way].append(_run(way, workers, options.rows, model, options.data))
        for way in WAYS:
            seconds, cpu_s, tokens = map(min, zip(*tries[way], strict=True))
            print(
                f"| {way} | {workers} | {seconds:.2f} | {cpu_s:.2f} | {options.rows / seconds:.0f} | {tokens / seconds:.3g} |",
                flush=True,
            )


def _run(way: str, workers: int, rows: int, model: Path, data: Path) -> tuple[float, ...]:
    words = [sys.executable, "-m", "tests.harness.bench_encode", "--way", way, "--workers", workers]
    words += ["--rows", rows, "--model", model, "--data", data]
    threads = {
        "RAYON_NUM_THREADS": "1" if way == "ours" else str(workers),
        "TOKENIZERS_PARALLELISM": "true",
    }
    done = subprocess.run(
        list(map(str, words)), env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(float(word) for word in done.stdout.splitlines()[-1].split())


if __name__ == "__main__":
    main()
