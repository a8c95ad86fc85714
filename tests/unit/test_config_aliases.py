"""Flags of ms-swift: understood, translated, or refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from megaswift.config.aliases import ALWAYS_SO, TRANSLATIONS
from megaswift.config.field import declared
from megaswift.config.parse import parse, parse_run
from megaswift.config.refused import REFUSED
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError

FLAGS_OF_MS_SWIFT = (Path(__file__).parent.parent / "golden" / "ms_swift_flags.txt").read_text().split()
DECLARED = {name for one in declared(RunConfig).values() for name in (one.flag, *one.aliases)}


def test_every_flag_of_ms_swift_is_known() -> None:
    known = DECLARED | set(TRANSLATIONS) | set(ALWAYS_SO) | set(REFUSED)
    assert [flag for flag in FLAGS_OF_MS_SWIFT if flag not in known] == []


def test_no_name_means_two_things() -> None:
    names = [name for one in declared(RunConfig).values() for name in (one.flag, *one.aliases)]
    names += [*TRANSLATIONS, *ALWAYS_SO, *REFUSED]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("words", "same_as"),
    [
        ("--bf16 true", "--torch_dtype bfloat16"),
        ("--bf16 false", ""),
        ("--fp16", "--torch_dtype float16"),
        ("--bf16 --torch_dtype bfloat16", "--torch_dtype bfloat16"),
        ("--sft_type lora", "--tuner_type lora"),
        ("--save x --save_interval 5 --log_interval 2", "--output_dir x --save_steps 5 --logging_steps 2"),
        ("--max_epochs 2", "--num_train_epochs 2"),
        ("--max_steps 10 --warmup_steps 3", "--train_iters 10 --lr_warmup_iters 3"),
        ("--max_steps -1", ""),
        ("--warmup_ratio 0.05", "--lr_warmup_fraction 0.05"),
        ("--lr_scheduler_type constant_with_warmup", "--lr_decay_style constant"),
        ("--optim adamw_torch_fused", "--optimizer adamw"),
        ("--max_grad_norm 0.5", "--clip_grad 0.5"),
        ("--no_save_optim true", "--save_optim false"),
        ("--save_only_model false", "--save_optim true"),
        ("--use_flash_ckpt true", "--async_save true"),
        ("--deepspeed zero2", "--use_distributed_optimizer true"),
        ("--deepspeed zero3", "--use_distributed_optimizer true"),
        ("--deepspeed zero3_offload", "--use_distributed_optimizer true --optimizer_cpu_offload true"),
        ("--router_aux_loss_coef 0.01", "--moe_aux_loss_coeff 0.01"),
        ("--lr 1e-4 --packing true --lr 1e-4", "--lr 1e-4 --packing true"),
        ("--ddp_timeout 1800", "--ddp_timeout_minutes 30"),
        ("--use_flash_attn true", "--attention_backend flash"),
        ("--attn_impl sdpa", "--attention_backend auto"),
        ("--sequence_parallel_size 2", "--context_parallel_size 2"),
        ("--evaluation_strategy epoch", "--eval_strategy epoch"),
        ("--cached_dataset d", "--dataset d"),
        ("--cached_dataset ./d/train", "--dataset d"),
        ("--cached_dataset ./d/e/train --cached_val_dataset d/e/val", "--dataset d/e"),
        ("--mcore_model d --finetune false", "--resume d"),
        (
            "--model m --mcore_model b --mcore_adapter d --finetune false",
            "--model m --mcore_model b --resume d",
        ),
        ("--load d --finetune=false", "--resume d"),
        ("--model m --load d", "--model m --mcore_model d"),
        ("--model m --mcore_model d --finetune true", "--model m --mcore_model d --resume never"),
        ("--resume_from_checkpoint d", "--resume d"),
        ("--finetune true", "--resume never"),
        (
            "--gradient_checkpointing true",
            "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
        ),
    ],
)
def test_an_old_name_says_the_same_as_ours(words: str, same_as: str) -> None:
    assert parse_run("sft", words.split()) == parse_run("sft", same_as.split())


def test_what_counts_as_right_is_no_setting_of_the_loss() -> None:
    seq, token = parse_run("sft", ["--acc_strategy", "seq"]), parse_run("sft", [])
    assert replace(seq, logging=token.logging) == token == parse_run("sft", ["--acc_strategy", "token"])
    assert seq.logging.acc_strategy == "seq"


@pytest.mark.parametrize(
    "words", ["--load_safetensors true", "--packing_cache x", "--deepspeed zero3", "--no_save_rng"]
)
def test_what_is_always_so_is_accepted_with_one_line(words: str) -> None:
    (note,) = parse("sft", words.split()).notes
    assert words.split()[0][2:] in note


@pytest.mark.parametrize(
    "words",
    [
        "--mtp_num_layers 0",
        "--use_galore false",
        "--streaming False",
        "--template none",
        "--lora_bias none",
        "--reward_model_plugin default",
    ],
)
def test_a_flag_that_asks_for_nothing_is_accepted(words: str) -> None:
    assert parse_run("sft", words.split()) == parse_run("sft", [])


@pytest.mark.parametrize(
    "words",
    [
        "--mtp_num_layers 1",
        "--muon_scalar_optimizer lion",
        "--template qwen2_5",
        "--lora_bias all",
        "--fp4_format e2m1",
        "--deepspeed ds.json",
        "--mcore_adapter d",
        "--finetune maybe",
        "--mcore_ref_adapter x",
        "--ref_adapter_load x",
        "--use_ray true",
        "--num_ppo_epochs 4",
        "--reward_model_plugin genrm",
        "--lr_scheduler_type polynomial",
        "--optim galore",
        "--resume_only_model",
        "--bf16 --torch_dtype float16",
        "--mcore_model d --finetune false --resume e",
        "--cached_val_dataset d/val",
        "--cached_val_dataset d/val --cached_dataset e/train",
        "--cached_val_dataset d/val e/val --cached_dataset d/train",
    ],
)
def test_what_is_not_built_is_refused_by_name(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run("sft", words.split())
    assert words.split()[0][2:] in str(caught.value)
