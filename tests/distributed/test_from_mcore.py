"""Training from a Megatron-Core checkpoint is training from the Hugging Face folder with the same weights, bit for bit."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.cli.main import main
from megaswift.config.model import ModelConfig
from megaswift.config.parse import parse_run
from megaswift.config.run import RunConfig
from megaswift.converters.dcp_pieces import CheckpointReader, McoreCheckpoint
from megaswift.converters.load import load_weights
from megaswift.mcore.process_groups import destroy, initialise
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from megaswift.training.reference import References
from tests.distributed.test_plain_megatron import CASES, plain_model, save_plainly
from tests.distributed.test_rlhf_runs import save_references, train_all
from tests.harness.distributed import run_distributed
from tests.harness.quantised import tensors_of
from tests.harness.tiny import save_tiny
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import synthetic_set, temporary_folder

LAYOUTS = {
    "tp2": Layout(world=2, tp=2),
    "pp2": Layout(world=2, pp=2),
    "ep2": Layout(world=2, ep=2),
    "tp2 ep2 etp2": Layout(world=4, tp=2, ep=2, etp=2, sequence_parallel=True),
}
# layout that writes -> models; "olmo2-odd-heads" and the vocabulary of 131 rows are padded by tp
WRITTEN: dict[str, tuple[str, ...]] = {
    "tp2": ("llama-tied", "olmo2-odd-heads", "starcoder2", "qwen3_next", "gemma4_text"),
    "pp2": ("llama-tied", "deepseek_v3"),
    "ep2": ("qwen2_moe-mixed", "deepseek_v3", "gpt_oss", "llama4_text"),
    "tp2 ep2 etp2": ("mixtral", "glm4_moe_lite"),
}


def build(name: Path, layout: Layout) -> tuple[list[Any], Any]:
    """Return this rank's chunks, filled with NaN, and the facts about the model."""
    meta = get_model_meta(name)
    run = RunConfig(model=ModelConfig(torch_dtype="float32"))
    chunks = build_model(meta, run, layout, select_platform("cpu"))
    for chunk in chunks:
        for tensor in chunk.parameters():
            torch.nn.init.constant_(tensor, torch.nan)
    return chunks, meta


def tensors(chunks: list[Any]) -> list[torch.Tensor]:
    return [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]


def write_and_read(rank: int, world_size: int, root: Path, names: list[str], layout: Layout) -> None:
    """Load models from folders, save them by Megatron's own writer, load those and convert's, and compare every parameter."""
    for name in names:
        initialise(layout, seed=1, timeout_min=2)
        folder, written = root / name / "hf", root / name / "written"
        chunks, meta = build(folder, layout)
        load_weights(chunks, meta, layout, rank, folder)
        if rank == 0:
            written.mkdir()
        torch.distributed.barrier()
        save_plainly(chunks[0], written)
        torch.distributed.barrier()
        for source in (written, root / name / "mcore"):
            again, _ = build(folder, layout)
            load_weights(again, meta, layout, rank, McoreCheckpoint(folder=source))
            assert all(map(torch.equal, tensors(again), tensors(chunks))), (name, source)
        destroy()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", WRITTEN)
def test_ranks_read_what_they_would_of_the_folder(tmp_path: Path, layout: str) -> None:
    names = WRITTEN[layout]
    for name in names:
        folder = save_tiny(name, tmp_path / name / "hf", dtype=torch.bfloat16)
        there = [
            "convert",
            "--model",
            str(folder),
            "--to",
            "mcore",
            "--output_dir",
            str(tmp_path / name / "mcore"),
        ]
        assert main([*there, "--make_vocab_size_divisible_by", "2"]) == 0
    run_distributed(write_and_read, LAYOUTS[layout].world, tmp_path, list(names), LAYOUTS[layout])
    for name in names:  # what another layout wrote, on one rank
        run_distributed(read_alone, 1, tmp_path / name / "hf", tmp_path / name / "written")


def read_alone(rank: int, world_size: int, folder: Path, written: Path) -> None:
    initialise(Layout(), seed=1, timeout_min=2)
    (one, meta), (other, _) = build(folder, Layout()), build(folder, Layout())
    load_weights(one, meta, Layout(), 0, folder)
    load_weights(other, meta, Layout(), 0, McoreCheckpoint(folder=written))
    assert all(map(torch.equal, tensors(other), tensors(one)))
    destroy()


def save_plain_model(
    rank: int, world_size: int, target: Path, differs: dict[str, Any], axes: dict[str, int]
) -> None:
    """Build Megatron's GPTModel by its own calls, with random weights, and save it."""
    model = plain_model(differs, axes)
    if rank == 0:
        target.mkdir()
    torch.distributed.barrier()
    save_plainly(model, target)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", CASES)
def test_what_plain_megatron_saves_is_read_as_convert_reads_it(tmp_path: Path, name: str) -> None:
    differs, axes = CASES[name]
    folder = save_tiny(name, tmp_path / "hf")
    run_distributed(save_plain_model, 2, tmp_path / "saved", differs, axes)
    back = ["convert", "--model", str(tmp_path / "saved"), "--hf_model", str(folder), "--to", "hf"]
    assert main([*back, "--output_dir", str(tmp_path / "converted")]) == 0
    run_distributed(read_alone, 1, tmp_path / "converted", tmp_path / "saved")
    before, after = tensors_of(folder), tensors_of(tmp_path / "converted")
    assert not any(torch.equal(before[key], after[key]) for key in before if key.endswith("_proj.weight"))
    reader = CheckpointReader(get_model_meta(folder), McoreCheckpoint(folder=tmp_path / "saved"))
    assert reader.tensors.keys() == after.keys()


STEPS = 3
TP2_PP2 = ("--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2")
LORA = ("--tuner_type", "lora", "--merge_lora", "true")
PRECOMPUTED = ("--precompute_ref_log_probs", "true")
# A run from a Hugging Face folder, and the same from a checkpoint: ranks, task, flags; {0} is the folder of all models.
# "bare" has config.json and tokenizer alone; "mcore" is "model" converted, and "merged" another model, "merged-mcore" that converted.
HF, MCORE = "--model {0}/model", "--mcore_model {0}/mcore"
PAIRS: dict[str, tuple[int, str, str, str, tuple[str, ...]]] = {
    "full": (1, "sft", HF, MCORE, ()),
    "with a model": (1, "sft", HF, MCORE + " --model {0}/bare", ()),
    "lora": (1, "sft", HF, MCORE + "/release", LORA),
    "reward model": (1, "rlhf", HF, MCORE, ("--rlhf_type", "rm")),
    "own reference": (1, "rlhf", HF, MCORE, ("--rlhf_type", "dpo")),
    "dpo": (
        1, "rlhf", HF + " --ref_model {0}/merged", HF + " --mcore_ref_model {0}/merged-mcore", ("--rlhf_type", "dpo"),
    ),
    "dpo lora precomputed": (
        1, "rlhf", HF + " --ref_model {0}/merged", MCORE + " --mcore_ref_model {0}/merged-mcore",
        ("--rlhf_type", "dpo", *LORA, *PRECOMPUTED),
    ),
    "reference of a folder": (
        1, "rlhf", HF + " --ref_model {0}/merged", MCORE + " --ref_model {0}/merged", ("--rlhf_type", "dpo"),
    ),
    "tp2 pp2": (4, "sft", HF, MCORE, TP2_PP2),
    "dpo tp2 pp2": (
        4, "rlhf", HF + " --ref_model {0}/merged", MCORE + " --mcore_ref_model {0}/merged-mcore",
        ("--rlhf_type", "dpo", *TP2_PP2),
    ),
}  # fmt: skip
TIMED = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")


@cache
def root() -> Path:
    folder = temporary_folder()
    model, rows = make_tiny_run(folder, rows=12)
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    (folder / "pairs.jsonl").write_text(
        "".join(
            json.dumps({**row, "rejected_response": "no " * (1 + n % 4)}) + "\n"
            for n, row in enumerate(pairs)
        )
    )
    save_references(model, folder)
    for path in model.iterdir():  # a tokenizer, so that each is a model of its own
        if not (folder / "merged" / path.name).exists():
            shutil.copy(path, folder / "merged")
    shutil.copytree(model, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for source, output in (("model", "mcore"), ("merged", "merged-mcore")):
        words = [
            "convert",
            "--model",
            str(folder / source),
            "--to",
            "mcore",
            "--output_dir",
            str(folder / output),
        ]
        assert main([*words, "--make_vocab_size_divisible_by", "64", "--max_shard_size", "50KB"]) == 0
    return folder


def run_of(name: str, side: int) -> RunConfig:
    _, task, *both, flags = PAIRS[name]
    rows = "rows" if task == "sft" else "pairs"
    return parse_run(task, [
        *both[side].format(root()).split(), "--dataset", str(root() / f"{rows}.jsonl"), "--output_dir", str(root() / f"{name} {side}"),
        "--train_iters", str(STEPS), "--global_batch_size", "4", "--learning_rate", "1e-3", "--logging_steps", "1",
        "--report_to", "none", *flags,
    ])  # fmt: skip


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    runs = [run_of(name, side) for name, (world, *_) in PAIRS.items() for side in (0, 1) if world == ranks]
    run_distributed(train_all, ranks, runs)


def figures(output: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root() / output / "logging.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", PAIRS)
def test_a_run_from_a_checkpoint_is_the_run_from_the_folder(name: str) -> None:
    trained(PAIRS[name][0])
    assert figures(f"{name} 0") == figures(f"{name} 1")
    outputs = [root() / f"{name} {side}" / f"checkpoint-{STEPS}" for side in (0, 1)]
    kind = "merged" if "lora" in name else "hf"
    one, other = (tensors_of(output / kind) for output in outputs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    small = [
        {path.name: path.read_bytes() for path in (output / kind).iterdir() if path.suffix != ".safetensors"}
        for output in outputs
    ]
    assert small[0] == small[1]


def test_the_references_of_these_runs_differ_from_the_model() -> None:
    """Or equal figures would say little."""
    trained(1)
    assert figures("own reference 0")[0] != figures("dpo 0")[0]


@pytest.mark.ranks(4)
def test_a_checkpoint_of_a_run_starts_another_under_another_layout() -> None:
    """It holds an optimizer state, too, which is left alone, and lies beside the export of the same weights."""
    trained(4)
    saved = root() / "tp2 pp2 0" / f"checkpoint-{STEPS}"
    assert (saved / "megatron" / ".metadata").exists()
    both = []
    for side, words in enumerate((["--model", str(saved / "hf")], ["--mcore_model", str(saved)])):
        run = parse_run("sft", [
            *words, "--dataset", str(root() / "rows.jsonl"), "--output_dir", str(root() / f"again {side}"),
            "--train_iters", "2", "--global_batch_size", "4", "--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none",
        ])  # fmt: skip
        both.append(run)
    run_distributed(train_all, 1, both)
    assert figures("again 0") == figures("again 1")


def test_a_lora_run_goes_on_beside_the_weights_of_the_checkpoint() -> None:
    """The frozen weights are read again: they are in no checkpoint of the run."""
    trained(1)
    whole = figures("lora 1")
    stopped = root() / "lora stopped"
    run_distributed(train_all, 1, [parse_run("sft", [
        *PAIRS["lora"][3].format(root()).split(), "--dataset", str(root() / "rows.jsonl"), "--output_dir", str(stopped),
        "--train_iters", str(iters), "--lr_decay_iters", str(STEPS), "--global_batch_size", "4", "--learning_rate", "1e-3",
        "--logging_steps", "1", "--report_to", "none", *LORA,
    ]) for iters in (2, STEPS)])  # fmt: skip
    found = figures("lora stopped")
    assert [line["loss"] for line in found] == [line["loss"] for line in whole]


def test_references_computed_once_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Another checkpoint under the same name has others."""
    changing = Path(shutil.copytree(root() / "merged-mcore", tmp_path / "mcore"))
    run = run_of("dpo lora precomputed", 1)
    run = replace(run, preference=replace(run.preference, mcore_ref_model=str(changing)))
    references = References(
        run=run,
        meta=get_model_meta(root() / "model"),
        layout=Layout(),
        platform=select_platform("cpu"),
        output_dir=tmp_path,
        group=None,
    )
    encoded = synthetic_set()
    key = references._key(encoded)
    assert references._key(encoded) == key
    next((changing / "release").glob("*.distcp")).touch()
    assert references._key(encoded) != key
