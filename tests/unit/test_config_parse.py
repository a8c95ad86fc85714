"""Command line and YAML to a RunConfig."""

from dataclasses import replace
from pathlib import Path

import pytest

from megaswift.config.dump import dump_run
from megaswift.config.parse import make_run, parse, parse_run
from megaswift.errors import ConfigError

DESIGN_COMMAND = (
    "--model Qwen/Qwen2.5-7B-Instruct --train_type lora --dataset AI-ModelScope/alpaca-gpt4-data-zh#500 "
    "AI-ModelScope/alpaca-gpt4-data-en#500 swift/self-cognition#500 --torch_dtype bfloat16 --num_train_epochs 1 "
    "--per_device_train_batch_size 1 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules all-linear "
    "--gradient_accumulation_steps 16 --output_dir output"
)


def test_the_command_of_the_readme_is_understood() -> None:
    run = parse_run("sft", DESIGN_COMMAND.split())
    assert run.model.model == "Qwen/Qwen2.5-7B-Instruct" and run.model.torch_dtype == "bfloat16"
    assert len(run.data.dataset) == 3 and run.data.dataset[2] == "swift/self-cognition#500"
    assert run.tuner.tuner_type == "lora" and (run.tuner.lora_rank, run.tuner.lora_alpha) == (8, 32)
    assert run.optimizer.lr == 1e-4
    assert (run.training.micro_batch_size, run.training.gradient_accumulation_steps) == (1, 16)
    assert run.training.num_train_epochs == 1.0


def test_dashes_underscores_and_equals_signs_are_the_same() -> None:
    words = ["--micro-batch-size", "2", "--lr=3e-5", "--dataset=a", "b"]
    run = parse_run("sft", words)
    assert run == parse_run("sft", "--micro_batch_size=2 --lr 3e-5 --dataset a b".split())
    assert run.data.dataset == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "packing"),
    [(["--packing"], True), (["--packing", "true"], True), (["--packing=False"], False), ([], False)],
)
def test_a_bare_boolean_is_true(words: list[str], packing: bool) -> None:
    assert parse_run("sft", words).data.packing is packing


def test_dictionaries_are_json_and_none_is_a_value() -> None:
    run = parse_run("sft", ["--columns", '{"text": "content"}', "--max_length", "none"])
    assert run.data.columns == {"text": "content"} and run.data.max_length is None


def test_negative_numbers_are_values_not_flags() -> None:
    assert parse_run("sft", ["--eval_iters", "-1"]).logging.eval_iters == -1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lerning_rate 1", "lerning_rate is not a flag. Did you mean learning_rate?"),
        ("--lr x", "lr=x is not a number"),
        ("--micro_batch_size 1.5", "micro_batch_size=1.5 is not a whole number"),
        ("--packing maybe", "packing=maybe is not true or false"),
        ("--tuner_type lra", "tuner_type=lra is not one of the choices. Did you mean lora?"),
        ("--columns {", "columns={ is not JSON"),
        ("--columns [1]", "columns=[1] is not a JSON object"),
        ("--model", "model has no value"),
        ("--model a b", "model takes one value, not 2: a b"),
        ("--lr 1 --lr 2", "lr is given twice"),
        ("--lr 1 --learning_rate 1", "lr and learning_rate are the same setting (lr)"),
        ("rows.jsonl --lr 1", "rows.jsonl belongs to no flag"),
        ("--config nowhere.yaml", "config=nowhere.yaml cannot be read"),
        (
            "--output_dir ~nobody-has-this-name/out",
            "begins in the home of a user whom this machine does not know",
        ),
        ("--dataset a.jsonl ~nobody-has-this-name/b", "dataset=~nobody-has-this-name/b begins in the home"),
    ],
)
def test_bad_words_give_one_clear_message(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run("sft", words.split())
    assert message in str(caught.value)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\nlr: 1e-3\npacking: true\ndataset: [x, y]\n")
    run = parse_run("sft", ["--config", str(file), "--learning_rate", "2e-3", "--dataset", "z"])
    assert run.model.model == "a" and run.optimizer.lr == 2e-3  # YAML 1.1 reads 1e-3 as text
    assert run.data.packing and run.data.dataset == ["z"]
    assert parse_run("sft", [str(file)]).optimizer.lr == 1e-3


def test_another_way_to_say_the_same_replaces_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("global_batch_size: 64\ntrain_iters: 10\n")
    run = parse_run("sft", [str(file), "--gradient_accumulation_steps", "4", "--num_train_epochs", "2"])
    assert run.training.global_batch_size is None and run.training.gradient_accumulation_steps == 4
    assert run.training.train_iters is None and run.training.num_train_epochs == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "lerning_rate is not a flag"),
        ("- a\n- b", "is not a list of `flag: value` lines"),
        ("a: [", "is not YAML"),
        ("task: pt", "is for `megaswift pt`, not `megaswift sft`"),
        ("train_type: lora\ntuner_type: full", "train_type and tuner_type are the same setting"),
        ("lr: [1, 2]", "lr takes one value, not 2"),
    ],
)
def test_bad_files_give_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_run("sft", [str(file)])
    assert message in str(caught.value)


def test_what_is_dumped_reads_back_the_same(tmp_path: Path) -> None:
    words = [
        *DESIGN_COMMAND.split(),
        "--system",
        "a: 'b' # c\n- d",
        "--columns",
        '{"x y": "z"}',
        "--model_author",
        "ü",
    ]
    run = parse_run("sft", words)
    file = tmp_path / "args.yaml"
    file.write_text(dump_run(run), encoding="utf-8")
    named = replace(run.launch, auto_layout=False)  # a dump names its layout
    assert parse_run("sft", ["--config", str(file)]) == replace(run, launch=named)


def test_a_parallel_flag_is_a_layout() -> None:
    assert parse_run("sft", []).launch.auto_layout
    assert not parse_run("sft", ["--tp", "1"]).launch.auto_layout
    assert not parse_run("sft", ["--recompute_granularity", "full", "--auto_layout"]).launch.auto_layout


def test_a_token_is_never_dumped() -> None:
    assert "secret" not in dump_run(parse_run("sft", ["--hub_token", "secret"]))


def test_pre_training_means_all_tokens_of_plain_text() -> None:
    run = parse_run("pt", [])
    assert run.task == "pt" and run.data.loss_scale == "all" and not run.data.use_chat_template
    assert parse_run("pt", ["--use_chat_template"]).data.use_chat_template


def test_python_says_what_the_command_line_says() -> None:
    assert make_run("sft", dataset=["a"], learning_rate=1e-4, packing=True) == parse_run(
        "sft", "--dataset a --lr 1e-4 --packing".split()
    )


def test_a_task_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="task=rlfh is not built"):
        parse("rlfh", [])
