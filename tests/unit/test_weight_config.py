"""Where a run with --mcore_model or --mcore_ref_model takes config.json and weights from, and what does not go with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megaswift.config.dump import dump_run
from megaswift.config.parse import parse_run, parse_saved
from megaswift.config.reference import needs_reference
from megaswift.config.rules import check_request, resolve
from megaswift.config.run import RunConfig
from megaswift.errors import CheckpointError, ConfigError
from megaswift.launch.preflight import check_run, checkpoint_bytes
from megaswift.launch.rehearsal import rehearsal_of
from megaswift.metadata.count import count_parameters
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from tests.harness.conversions import saved, there


def parsed(words: str, task: str = "sft") -> RunConfig:
    return parse_run(task, [*words.split(), "--dataset", "rows.jsonl"])


def in_hf(checkpoint: Path) -> Path:
    return checkpoint / "hf"


def itself(checkpoint: Path) -> Path:
    return checkpoint


@pytest.mark.parametrize("place", [in_hf, itself])
@pytest.mark.parametrize("given", ["", "iter_0000010"])
def test_the_model_is_the_one_beside_the_checkpoint(
    tmp_path: Path, place: Callable[[Path], Path], given: str
) -> None:
    """As this project lays it out, and as ms-swift does; the folder of the iteration may be named too."""
    place(tmp_path).mkdir(exist_ok=True)
    (place(tmp_path) / "config.json").write_text("{}")
    (tmp_path / "iter_0000010").mkdir()
    run = parsed(f"--mcore_model {tmp_path / given}")
    assert Path(str(run.model.model)) == place(tmp_path)
    (tmp_path / "run.yaml").write_text(dump_run(run))
    assert parse_saved(tmp_path / "run.yaml").model == run.model


def test_a_model_that_is_named_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert parsed(f"--mcore_model {tmp_path} --model m").model.model == "m"
    with pytest.raises(ConfigError, match=r"mcore_model=nowhere has no config\.json beside it.*Give --model"):
        parsed("--mcore_model nowhere")


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("pt", "--mcore_model c --random_init", "mcore_model=c has others"),
        ("sft", "--mcore_ref_model c", "mcore_ref_model=c is for `megaswift rlhf`"),
        ("rlhf", "--mcore_ref_model c --rlhf_type rm", "is for rlhf_type dpo and kto and grpo, not rm"),
        ("rlhf", "--mcore_ref_model c --rlhf_type gkd", "is for rlhf_type dpo and kto and grpo, not gkd"),
        ("rlhf", "--mcore_ref_model c --reference_free", "reference_free=true has no reference model"),
        ("rlhf", "--mcore_ref_adapter c", "Adapters are PEFT folders here: give --ref_adapters"),
        ("sft", "--mcore_adapter c", "Adapters are PEFT folders here: give --adapters"),
    ],
)
def test_what_does_not_go_together_is_refused(task: str, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(parsed(f"--model m {words}", task))


def test_adapters_have_a_reference_beside_them_where_a_checkpoint_is_named() -> None:
    words = "--model m --rlhf_type dpo --tuner_type lora"
    assert not needs_reference(parsed(words, "rlhf"))
    assert needs_reference(parsed(f"{words} --mcore_ref_model c", "rlhf"))
    assert parsed("--model m --ref_load c", "rlhf").preference.mcore_ref_model == "c"


def test_what_is_not_in_the_checkpoint_is_said(tmp_path: Path) -> None:
    folder = there(saved("deepseek_v3"), tmp_path / "mcore")
    meta = get_model_meta(folder / "hf")

    def notes(words: str, mtp_layers: int = 0) -> str:
        changed = replace(meta, num_mtp_layers=mtp_layers)
        return " ".join(resolve(parsed(f"--mcore_model {folder} {words}"), changed, 1, "cpu").notes)

    assert "adapters belong to its weights" in notes("--tuner_type lora")
    assert "adapters belong" not in notes("") + notes("--tuner_type lora --merge_lora true")
    assert "exports will have none" in notes("", mtp_layers=1)
    (folder / "hf" / "carried.safetensors").touch()
    assert "exports will have none" not in notes("", mtp_layers=1) + notes("")


def test_a_checkpoint_of_another_model_is_found_before_ranks_start(tmp_path: Path) -> None:
    folder = there(saved("qwen2"), tmp_path / "mcore")
    other = there(saved("llama-tied"), tmp_path / "other")
    check_run(parsed(f"--mcore_model {folder}"), world_size=1, platform_name="cpu")
    check_run(
        parsed(f"--mcore_model {folder} --mcore_ref_model {folder}", "rlhf"),
        world_size=1,
        platform_name="cpu",
    )
    for words in (
        f"--mcore_model {folder} --model {saved('llama-tied')}",
        f"--mcore_model {folder} --mcore_ref_model {other}",
        f"--mcore_model {folder} --mcore_ref_model {saved('qwen2')}",
    ):
        with pytest.raises(CheckpointError):
            check_run(parsed(words, "rlhf"), world_size=1, platform_name="cpu")


def test_a_classifier_starts_from_a_checkpoint_with_a_head_of_its_own(tmp_path: Path) -> None:
    folder = there(saved("qwen2"), tmp_path / "mcore")
    words = f"--mcore_model {folder} --task_type seq_cls --num_labels 3"
    check_run(parsed(words), world_size=1, platform_name="cpu")


def test_room_for_checkpoints_is_counted_from_config(tmp_path: Path) -> None:
    folder = there(saved("qwen2"), tmp_path / "mcore")
    meta, run = get_model_meta(folder / "hf"), parsed(f"--mcore_model {folder} --torch_dtype bfloat16")
    assert checkpoint_bytes(run, meta) == 16 * count_parameters(meta).total


def test_a_rehearsal_reads_neither_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    run = parsed(f"--mcore_model {tmp_path} --mcore_ref_model c --micro_batch_size 1", "rlhf")
    rehearsed = rehearsal_of(run, Layout(), model="small", output_dir="out")
    assert (rehearsed.model.model, rehearsed.model.mcore_model) == ("small", None)
    assert (rehearsed.preference.ref_model, rehearsed.preference.mcore_ref_model) == ("small", None)
