"""Every rule between settings, a model's facts and the ranks there are."""

import importlib
import inspect
import pkgutil
from dataclasses import replace
from typing import Any

import pytest

from megaswift import config
from megaswift.config.case import Case
from megaswift.config.dump import dump_run
from megaswift.config.parse import parse, parse_run
from megaswift.config.rules import REQUEST_RULES, RULES, ResolvedRun, minimal_world, resolve
from megaswift.config.run import RunConfig
from megaswift.config.tuner_rules import adapters_are_asked_for
from megaswift.errors import ConfigError
from megaswift.metadata.meta import (
    AttentionMeta,
    LayerInputs,
    LayerVariation,
    LinearAttentionMeta,
    ModelMeta,
    MoEMeta,
)
from megaswift.parallel.layout import Layout

NEEDED = "--model m --dataset rows.jsonl "


def dense(**changes: Any) -> ModelMeta:
    """A dense model of 8 layers with the heads of an 8B model."""
    facts: dict[str, Any] = {
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "family": "llama",
        "folder": None,
        "num_layers": 8,
        "hidden_size": 256,
        "ffn_hidden_size": 1024,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 8,
        "vocab_size": 1000,
        "max_length": 4096,
    }
    return ModelMeta(**{**facts, **changes})


def moe(**changes: Any) -> ModelMeta:
    """The same with 8 experts in every layer."""
    experts = MoEMeta(num_experts=8, topk=2, ffn_hidden_size=96, layer_is_moe=(True,) * 8)
    return dense(**{"moe": experts, **changes})


def handing_on(**changes: Any) -> ModelMeta:
    """The same whose second half takes keys of the first."""
    varied = LayerVariation(
        head_dims=(8,) * 8,
        num_kv_heads=(8,) * 8,
        ffn_hidden_sizes=(1024,) * 8,
        value_is_key=(False,) * 8,
        kv_from_layer=(None,) * 4 + (3,) * 4,
    )
    return dense(layer_variation=varied, **changes)


def hybrid(**sizes: int) -> ModelMeta:
    """The same with Gated DeltaNet in all layers but the last, whose attention is gated."""
    heads = {
        "num_key_heads": 16,
        "num_value_heads": 32,
        "key_head_dim": 8,
        "value_head_dim": 8,
        "conv_kernel": 4,
        **sizes,
    }
    linear = LinearAttentionMeta(layers=(True,) * 7 + (False,), **heads)
    return dense(num_kv_heads=2, linear_attention=linear, attention=AttentionMeta(output_gate=True))


def resolved(
    words: str, meta: ModelMeta, *, world: int = 1, platform: str = "cpu", task: str = "sft"
) -> ResolvedRun:
    return resolve(parse_run(task, (NEEDED + words).split()), meta, world, platform)


@pytest.mark.parametrize(
    ("words", "meta", "world", "message"),
    [
        ("--tp 0", dense(), 1, "tensor_model_parallel_size=0 is not a size. Give 1 or more."),
        ("--tp 3", dense(), 3, "tp=3 does not divide ffn_hidden_size=1024 (llama). Choose tp from 1, 2, 4, 8, 16, 32."),
        ("--tp 64", dense(), 64, "tp=64 is above num_heads=32 (llama). Choose tp from 1, 2, 4, 8, 16, 32."),
        ("--tp 4", hybrid(), 4, "tp=4 is above num_kv_heads=2 (llama), whose attention is gated. Choose tp from 1, 2."),
        ("--tp 2", hybrid(num_key_heads=5), 2, "tp=2 does not divide linear_num_key_heads=5 (llama). Choose tp from 1, 5."),
        ("--pp 2", handing_on(), 2, "pipeline_model_parallel_size=2 parts layers of llama that hand on keys of earlier layers"),
        ("--recompute_granularity full", handing_on(), 1, "recompute_granularity=full computes layers of llama again without"),
        ("--pp 2", dense(layer_inputs=LayerInputs(vocab_size=9, hidden_size=4)), 2, "that hand on inputs of each layer"),
        ("--tp 2", dense(), 3, "world_size=3 is not a multiple of tp=2 x pp=1 x cp=1 = 2"),
        ("--cp 2", dense(attention=AttentionMeta(chunk=(64,) * 8)), 2, "context_parallel_size=2 but llama has chunked attention"),
        ("--cp 2", dense(attention=AttentionMeta(softcap=50.0)), 2, "soft-capped scores, which needs whole sequences"),
        ("--cp 2", hybrid(), 2, "context_parallel_size=2 but llama has linear attention"),
        ("--cp 2 --attention_dropout 0.1", dense(), 2, "attention_dropout=0.1 does not go with context_parallel_size=2"),
        ("--cp 5 --cp_comm_type a2a", dense(), 5, "cp_comm_type=a2a cannot exchange 32 query and 8 key/value heads"),
        ("--cp 3 --cp_comm_type a2a+p2p", dense(), 3, "There is none. Choose p2p, all_gather or auto."),
        ("--fp8_recipe blockwise --fp8_param_gather", dense(), 1, "fp8_param_gather needs --fp8_format hybrid or e4m3"),
        ("--fp8_format hybrid --first_last_layers_bf16", dense(), 1, "does not go with fp8_recipe=delayed"),
        ("--fp8_format hybrid --fp8_amax_history_len 0", dense(), 1, "fp8_amax_history_len=0 is too small"),
        ("--ep 2", dense(), 2, "expert_model_parallel_size=2 but llama has no experts"),
        ("--async_save true --save_optim false", dense(), 1, "the state to resume from in the background, but save_optim=false"),
        ("--etp 2", dense(), 2, "expert_tensor_parallel_size=2 but llama has no experts"),
        ("--moe_aux_loss_coeff 0.1", dense(), 1, "moe_aux_loss_coeff is set but llama has no experts"),
        ("--ep 3", moe(), 3, "ep=3 does not divide num_experts=8 (llama). Choose ep from 1, 2, 4, 8."),
        ("--etp 5", moe(), 5, "etp=5 does not divide the expert's ffn_hidden_size=96"),
        ("--ep 4", moe(), 2, "world_size=2 is not a multiple of ep=4 x etp=1 x pp=1 = 4. This layout needs a multiple of 4"),
        ("--pp 3", dense(), 3, "pp=3 x vpp=1 does not divide num_layers=8"),
        ("--pp 2 --vpp 3", dense(), 2, "pp=2 x vpp=3 does not divide num_layers=8"),
        ("--vpp 2", dense(), 1, "vpp=2 needs pipeline stages"),
        ("--decoder_first_pipeline_num_layers 2", dense(), 1, "need pipeline stages"),
        ("--pp 3 --decoder_first_pipeline_num_layers 3", dense(), 3, "leave 5 of num_layers=8 for 2 stages"),
        ("--pp 2 --vpp 2 --global_batch_size 3", dense(), 2, "vpp=2 needs micro batches in multiples of pp=2"),
        ("--overlap_param_gather", dense(), 1, "overlap_param_gather=true needs"),
        ("--ddp_timeout 0", dense(), 1, "ddp_timeout_minutes=0.0 is not a time"),
        ("--hang_timeout_seconds 600", dense(), 1, "hang_timeout_seconds=600 is not below ddp_timeout_minutes=10"),
        ("--fp16", dense(), 1, "torch_dtype=float16 does not train on a CPU"),
        ("--global_batch_size 6", dense(), 4, "global_batch_size=6 is not a multiple of micro_batch_size=1 x dp=4 = 4. Choose 4 or 8"),
        ("--global_batch_size 1", dense(), 4, "Choose 4, or another micro batch"),
        ("--global_batch_size 8 --gradient_accumulation_steps 3", dense(), 2, "makes it 4. Give one of them."),
        ("--recompute_granularity full --recompute_modules mlp", dense(), 1, "recompute_modules is for recompute_granularity=selective"),
        ("--recompute_granularity full --recompute_num_layers 9", dense(), 1, "is not between 1 and num_layers=8"),
        ("--recompute_method block", dense(), 1, "need recompute_granularity=full, not none"),
        ("--recompute_modules mlp", dense(), 1, "recompute_modules needs recompute_granularity=selective"),
        ("--recompute_granularity selective --recompute_modules mpl", dense(), 1, "recompute_modules=mpl is not known. Did you mean mlp?"),
        ("--warmup_ratio 0.1 --warmup_steps 5", dense(), 1, "are both set"),
        ("--lr 1e-5 --min_lr 1e-4", dense(), 1, "must be at least min_lr=0.0001"),
        ("--lr_decay_style WSD", dense(), 1, "lr_decay_style=WSD needs --lr_wsd_decay_iters"),
        ("--max_length 8192", dense(), 1, "max_length=8192 is above the context of llama, 4096 tokens"),
        ("--max_length 512 --packing_length 256", dense(), 1, "packing_length=256 is below max_length=512"),
        ("--packing --padding_free false", dense(), 1, "packing=true needs padding_free=true"),
        ("--truncation_strategy split", dense(), 1, "truncation_strategy=split is for `megaswift pt`, not sft"),
        ("--adapters a", dense(), 1, "adapters needs tuner_type=lora, not full"),
        ("--merge_lora", dense(), 1, "merge_lora needs tuner_type=lora"),
        ("--use_dora true", dense(), 1, "use_dora needs tuner_type=lora"),
        ("--lorap_lr_ratio 16", dense(), 1, "lorap_lr_ratio needs tuner_type=lora"),
        ("--init_weights pissa", dense(), 1, "init_weights needs tuner_type=lora"),
        ("--tuner_type lora --init_weights eva", dense(), 1, "Choose true, gaussian, loftq, lora-ga, olora, pissa or pissa_niter_N"),
        ("--init_weights lora-ga", dense(), 1, "init_weights needs tuner_type=lora"),
        ("--tuner_type lora --init_weights lora-ga --adapters a", dense(), 1, "Leave one of them out"),
        ("--tuner_type lora --init_weights lora-ga --lora_ga_stable_gamma 0", dense(), 1, "lora_ga_stable_gamma=0 must be above 0"),
        ("--tuner_type lora --lora_ga_direction random", dense(), 1, "lora_ga_direction"),
        ("--tuner_type lora --lora_ga_iters 4", dense(), 1, "It takes the gradient of the first global batch"),
        ("--tuner_type lora --lora_ga_scale unit", dense(), 1, "lora_ga_scale is for init_weights=lora-ga, not true"),
        ("--tuner_type lora --init_weights loftq", dense(), 1, "init_weights=loftq starts from what quantising loses"),
        ("--tuner_type lora --init_weights pissa_niter_0", dense(), 1, "Choose true, gaussian, loftq, lora-ga, olora, pissa or"),
        ("--tuner_type lora --init_weights pissa --adapters a", dense(), 1, "Leave one of them out"),
        ("--quant_method bnb --quant_bits 4", dense(), 1, "quant_bits needs tuner_type=lora"),
        ("--tuner_type lora --quant_bits 4", dense(), 1, "Give --quant_method bnb --quant_bits 4"),
        ("--tuner_type lora --quant_method bnb --quant_bits 8", dense(), 1, "quant_bits=8 is not built"),
        ("--optimizer_cpu_offload true --optimizer sgd", dense(), 1, "optimizer_cpu_offload=true needs"),
        ("--optimizer_cpu_offload true --optimizer_offload_fraction 0", dense(), 1, "is not a share"),
        ("--optimizer_cpu_offload true --optimizer muon", dense(), 1, "optimizer_cpu_offload=true needs"),
        ("--use_galore true --galore_proj_type full", dense(), 1, "galore_proj_type=full is not built"),
        ("--use_galore true --optimizer muon", dense(), 1, "use_galore=true needs --optimizer adamw"),
        ("--muon_momentum 0.95", dense(), 1, "muon_momentum needs --optimizer muon or dist_muon, not adamw"),
        ("--optimizer muon --muon_momentum 1", dense(), 1, "muon_momentum=1.0 is not a share"),
        ("--optimizer muon --muon_extra_scale_factor 0", dense(), 1, "muon_extra_scale_factor=0.0 must be above 0"),
        ("--optimizer muon --muon_num_ns_steps 6", dense(), 1, "muon_num_ns_steps=6 does not go with muon_coefficient_type=quintic"),
        ("--optimizer muon --muon_coefficient_type simple --muon_num_ns_steps 0", dense(), 1, "or 1 or more to simple"),
        ("--optimizer dist_muon --tp 2", dense(num_kv_heads=1, num_heads=9), 2, "optimizer=dist_muon needs a tp that divides num_heads=9"),
        ("--optimizer muon --muon_tp_mode blockwise --tp 16", dense(), 16, "as tp=16 is above num_kv_heads=8 (llama). Choose duplicated"),
        ("--tuner_type lora --lorap_lr_ratio 0", dense(), 1, "lorap_lr_ratio=0.0 must be above 0"),
        ("--tuner_type lora --adapters a b", dense(), 1, "training starts from one adapter"),
        ("--tuner_type lora --target_modules", dense(), 1, "target_modules is empty"),
        ("--tuner_type lora --freeze_parameters_ratio 0.5", dense(), 1, "freeze_parameters_ratio needs tuner_type=full, not lora"),
        ("--tuner_type lora --trainable_parameters lm_head", dense(), 1, "trainable_parameters needs tuner_type=full"),
        ("--freeze_parameters_ratio 1.5", dense(), 1, "freeze_parameters_ratio=1.5 is not a share"),
        ("--freeze_parameters_regex (", dense(), 1, "freeze_parameters_regex=( is not a regular expression"),
        ("--trainable_parameters lm_head", dense(), 1, "Add --freeze_parameters_ratio 1 to train these alone"),
        ("--lisa_activated_layers -1", dense(), 1, "lisa_activated_layers=-1 and lisa_step_interval=20: layers are 0 or more"),
        ("--lisa_activated_layers 2 --lisa_step_interval 0", dense(), 1, "lisa_step_interval=0: layers are 0 or more, steps 1 or"),
        ("--lisa_activated_layers 9", dense(), 1, "lisa_activated_layers=9 is above the 8 layers of llama. Choose fewer"),
        ("--lisa_activated_layers 2 --tuner_type lora", dense(), 1, "lisa_activated_layers=2 needs tuner_type=full, not lora"),
        ("--lisa_activated_layers 2 --freeze_parameters_ratio 0.5", dense(), 1, "not go with freeze_parameters and trainable_param"),
        ("--lisa_activated_layers 2 --use_galore true", dense(), 1, "lisa_activated_layers=2 does not go with use_galore"),
        ("--lisa_activated_layers 2 --optimizer muon", dense(), 1, "does not go with optimizer=muon"),
        ("--lisa_activated_layers 2 --optimizer_cpu_offload true", dense(), 1, "does not go with optimizer_cpu_offload"),
        ("--lisa_activated_layers 2 --offload_optimizer true", dense(), 1, "not go with offload_model and offload_optimizer"),
        ("--lisa_activated_layers 2 --fp8_format hybrid --fp8_param_gather true", dense(), 1, "does not go with fp8_param_gather"),
        ("--target_regex a", dense(), 1, "target_regex needs tuner_type=lora"),
        ("--tuner_type lora --target_regex [", dense(), 1, "target_regex=[ is not a regular expression"),
        ("--tuner_type lora --target_regex a --target_modules q_proj", dense(), 1, "both name modules. Give one of them"),
        ("--tuner_type lora --target_regex a --adapters b", dense(), 1, "target_regex does not go with --adapters"),
        ("--early_stop_interval 3", dense(), 1, "early_stop_interval=3 needs validations"),
        ("--metric_for_best_model token_acc", dense(), 1, "metric_for_best_model=token_acc needs validations. Give --val_dataset"),
        ("--metric_for_best_model token_acc --val_dataset v --eval_strategy no", dense(), 1, "metric_for_best_model=token_acc needs"),
        ("--greater_is_better true", dense(), 1, "greater_is_better=true needs validations"),
        ("--load_best_model_at_end true", dense(), 1, "The file OUTPUT_DIR/best names it (--metric_for_best_model)"),
        ("--group_by_length true --packing true", dense(), 1, "group_by_length=true has nothing to sort with packing=true"),
        ("--group_by_length true --streaming true --train_iters 3", dense(), 1, "nothing to sort with streaming=true"),
        ("--model_name a b c", dense(), 1, "model_name=a b c are 3 names. Give one, or a Chinese and an English one"),
        ("--loss_scale hermess", dense(), 1, "loss_scale=hermess is not one of default, last_round, all, with rules added by +. Did you mean hermes?"),
        ("--loss_scale last_round+default", dense(), 1, "loss_scale=last_round+default is not one of"),
        ("--loss_scale react+react", dense(), 1, "loss_scale=react+react names a rule twice"),
        ("--eval_metric rouge", dense(), 1, "eval_metric=rouge is not built for this task: validations report the loss and eval_metric=acc. Leave"),
        ("--acc_strategy seq --task_type seq_cls --num_labels 2", dense(), 1, "acc_strategy=seq is for token losses, not for task_type=seq_cls. Leave"),
        ("--acc_strategy sequence", dense(), 1, "acc_strategy=sequence"),
        ("--eval_metric acc --task_type seq_cls --num_labels 1", dense(), 1, "eval_metric=acc is not built for this task: validations report the loss."),
        ("--eval_metric paired --task_type embedding", dense(), 1, "validations report the loss and eval_metric=infonce. Leave"),
        ("--eval_metric infonce --task_type embedding --loss_type contrastive", dense(), 1, "validations report the loss and eval_metric=paired. Leave"),
        ("--early_stop_interval 0 --val_dataset v.jsonl", dense(), 1, "early_stop_interval=0 is too small"),
        ("--report_to wandbb", dense(), 1, "report_to=wandbb is not known. Choose from tensorboard, wandb, swanlab and none"),
        ("--callbacks early_stop", dense(), 1, "callbacks=early_stop has a flag of its own here. Give --early_stop_interval instead."),
        ("--callbacks print wandb", dense(), 1, "Give --report_to wandb instead."),
        ("--callbacks adalora", dense(), 1, "callbacks=adalora is neither FILE.py:NAME nor an entry point of megaswift.callbacks"),
        ("--wandb_project p", dense(), 1, "wandb_project=p is for --report_to wandb. Add it, or leave the name out."),
        ("--swanlab_exp_name n", dense(), 1, "swanlab_exp_name=n is for --report_to swanlab"),
        ("--random_init", dense(), 1, "random_init=true is for pre-training"),
        ("--save_total_limit 0", dense(), 1, "save_total_limit=0 is too small"),
        ("--split_dataset_ratio 1", dense(), 1, "split_dataset_ratio=1.0 is not a share"),
        ("--num_train_epochs 0", dense(), 1, "num_train_epochs=0.0 is too small"),
    ],
)  # fmt: skip
def test_a_broken_rule_says_what_to_do(words: str, meta: ModelMeta, world: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(words, meta, world=world)
    assert message in str(caught.value)


def test_callbacks_of_every_run_and_of_files_are_taken() -> None:
    run = resolved("--callbacks print default_flow watch.py:Watch", dense()).config
    assert run.logging.callbacks == ["print", "default_flow", "watch.py:Watch"]


@pytest.mark.parametrize("task", ["sft", "pt"])
@pytest.mark.parametrize("strategy", ["token", "seq"])
def test_validations_of_next_tokens_report_their_accuracy(strategy: str, task: str) -> None:
    run = resolved(f"--eval_metric acc --acc_strategy {strategy}", dense(), task=task).config
    assert (run.logging.eval_metric, run.logging.acc_strategy) == ("acc", strategy)


@pytest.mark.parametrize(
    ("words", "meta", "message"),
    [
        ("--cp 2 --cp_comm_type p2p", dense(sliding_window=(None, 64) * 4), "cannot carry the sliding window of 64"),
        ("--fp16 --fp8_format e4m3", dense(), "fp8_format=e4m3 does not go with torch_dtype=float16"),
        ("--fp8_format e4m3 --fp8_recipe mxfp8", dense(hidden_size=528), "takes sizes in multiples of 32, and llama has hidden_size=528"),
        ("--fp8_format hybrid --fp8_param_gather --tuner_type lora", dense(), "fp8_param_gather=true needs"),
        ("--fp8_format hybrid --fp8_param_gather --optimizer muon", dense(), "optimizer=muon does not go with fp8_param_gather=true"),
    ],
)  # fmt: skip
def test_a_rule_of_gpus_says_what_to_do(words: str, meta: ModelMeta, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(words, meta, world=2, platform="cuda")
    assert message in str(caught.value)


def test_a_cpu_rehearses_fp8_and_says_what_a_gpu_would_refuse() -> None:
    words = "--fp8_format hybrid --fp8_recipe mxfp8 --fp8_param_gather"
    run = resolved(words, dense(hidden_size=528))
    assert run.config.precision.fp8_format == "hybrid" and not run.config.precision.fp8_param_gather
    assert any("no GPU would run it" in note for note in run.notes)
    assert not any("GPU" in note for note in resolved("--fp8_format hybrid", dense()).notes)


def test_a_window_may_circulate_on_a_cpu_and_heads_may_be_exchanged() -> None:
    assert (
        resolved(
            "--sequence_parallel_size 2 --cp_comm_type p2p", dense(sliding_window=(64,) * 8), world=2
        ).layout.cp
        == 2
    )
    assert resolved("--cp 2 --cp_comm_type a2a", dense(), world=2, platform="cuda").layout.cp == 2


def test_a_model_and_rows_must_be_named() -> None:
    with pytest.raises(ConfigError, match="model is not set"):
        resolve(parse_run("sft", ["--dataset", "a"]), dense(), 1, "cpu")
    with pytest.raises(ConfigError, match="dataset is not set"):
        resolve(parse_run("sft", ["--model", "a"]), dense(), 1, "cpu")


def test_adapters_do_not_start_from_random_weights() -> None:
    with pytest.raises(ConfigError, match="needs tuner_type=full"):
        resolved("--random_init --tuner_type lora", dense(), task="pt")
    with pytest.raises(ConfigError, match="leaves nothing worth freezing"):
        resolved("--random_init --freeze_parameters model.norm", dense(), task="pt")


def test_rounding_at_the_end_of_an_interval_is_told() -> None:
    layers = "--lisa_activated_layers 8 --torch_dtype "
    assert any("is rounded at its end" in note for note in resolved(layers + "bfloat16", dense()).notes)
    assert not any("rounded" in note for note in resolved(layers + "float32", dense()).notes)
    assert not any("rounded" in note for note in resolved("--torch_dtype bfloat16", dense()).notes)


def rules_there_are() -> list[Any]:
    """Return the public functions of every *_rules.py that take a run, or a case, and answer nothing but with a new case."""
    found = []
    for entry in pkgutil.iter_modules(config.__path__):
        if not entry.name.endswith("_rules"):
            continue
        module = importlib.import_module(f"{config.__name__}.{entry.name}")
        for name, one in vars(module).items():
            if not inspect.isfunction(one) or one.__module__ != module.__name__ or name.startswith("_"):
                continue
            signature = inspect.signature(one)
            takes = [parameter.annotation for parameter in signature.parameters.values()]
            if takes in ([RunConfig], [Case]) and signature.return_annotation in (None, Case, Case | None):
                found.append(one)
    return found


def test_every_rule_is_applied() -> None:
    rules = rules_there_are()
    assert len(rules) > 60
    assert [rule.__name__ for rule in rules if rule not in {*RULES, *REQUEST_RULES}] == []


def test_the_layout_is_what_was_asked_for() -> None:
    layout = resolved(
        "--tp 2 --pp 2 --vpp 2 --sequence_parallel --gradient_accumulation_steps 4", dense(), world=8
    ).layout
    assert layout == Layout(world=8, tp=2, pp=2, vpp=2, sequence_parallel=True) and layout.dp == 2
    uneven = resolved("--pp 3 --decoder_first_pipeline_num_layers 2", dense(), world=3).layout
    assert (uneven.pp_first, uneven.pp_last) == (2, None)


def test_the_defaults_are_filled() -> None:
    run = resolved("", dense()).config
    assert run.training.global_batch_size == 16 and run.training.num_train_epochs == 1.0
    assert run.optimizer.lr == 1e-5 and run.model.torch_dtype == "float32"
    assert (run.data.max_length, run.data.packing_length, run.data.data_seed) == (4096, 4096, 42)
    assert run.logging.eval_steps == 500 and run.logging.tensorboard_dir == "output/runs"
    assert run.parallel.etp == 1 and run.launch.hang_timeout_seconds == 300
    assert resolved("--train_type lora", dense()).config.optimizer.lr == 1e-4
    assert resolved("", dense(), platform="cuda").config.model.torch_dtype == "bfloat16"
    assert resolved("--data_seed 0", dense()).config.data.data_seed == 0


def test_the_global_batch_follows_the_ranks() -> None:
    assert (
        resolved(
            "--gradient_accumulation_steps 4 --micro_batch_size 2", dense(), world=2
        ).config.training.global_batch_size
        == 16
    )
    rounded = resolved("", dense(), world=3)
    assert rounded.config.training.global_batch_size == 18
    assert "global_batch_size=18" in rounded.notes[0]


def test_steps_win_over_epochs() -> None:
    found = resolved("--train_iters 10 --num_train_epochs 3", dense())
    assert found.config.training.num_train_epochs is None and "train_iters=10 ends the run" in found.notes[0]
    assert resolved("--train_iters 10", dense()).config.training.num_train_epochs is None


def test_sequence_parallel_follows_tp() -> None:
    alone = resolved("--sequence_parallel", dense())
    assert not alone.layout.sequence_parallel and "it needs tp > 1" in alone.notes[0]
    experts = resolved("--tp 2", moe(), world=2)
    assert experts.layout.sequence_parallel and "experts with tp > 1 need it" in experts.notes[0]


def test_heads_that_do_not_divide_are_padded_and_said_so() -> None:
    odd = dense(num_heads=9, num_kv_heads=3)
    (note,) = resolved("--tp 2", odd, world=2).notes
    assert "tp=2 does not divide num_heads=9 and num_kv_heads=3: 12 and 4 are computed" in note
    assert resolved("--tp 2", dense(), world=2).notes == ()
    assert resolved("--tp 16", dense(), world=16).notes == ()  # Megatron-Core spreads the groups itself


@pytest.mark.parametrize("name", ["muon", "dist_muon"])
def test_muon_has_whole_matrices(name: str) -> None:
    found = resolved(f"--optimizer {name} --overlap_grad_reduce --overlap_param_gather", dense())
    parallel = found.config.parallel
    assert not parallel.use_distributed_optimizer and not parallel.overlap_param_gather
    assert parallel.overlap_grad_reduce
    (note,) = found.notes
    assert note.startswith(name) and "(use_distributed_optimizer" in note
    assert resolved(f"--optimizer {name} --use_distributed_optimizer false", dense()).notes == ()
    for tp in (8, 16):  # key/value heads of a rank, and ranks of one
        resolved(f"--optimizer {name} --tp {tp} --use_distributed_optimizer false", dense(), world=tp)


def test_full_recomputation_is_filled_and_selective_names_the_attention() -> None:
    full = resolved("--recompute_granularity full", dense()).config.training
    assert (full.recompute_method, full.recompute_num_layers) == ("uniform", 1)
    selective = resolved("--recompute_granularity selective", dense()).config.training
    assert selective.recompute_modules == ["core_attn"]


@pytest.mark.parametrize(
    ("words", "head_dim", "message"),
    [
        ("--torch_dtype float32", 128, "torch_dtype=float32 do not go together on GPUs"),
        (
            "--torch_dtype bfloat16",
            512,
            "has heads of 512, and kernels on GPUs take multiples of 8 up to 256",
        ),
        ("--torch_dtype bfloat16", 36, "has heads of 36"),
        ("--torch_dtype bfloat16", 128, ""),
    ],
)
def test_spread_attention_on_gpus_has_the_limits_of_its_kernels(
    words: str, head_dim: int, message: str
) -> None:
    meta = replace(dense(), head_dim=head_dim)
    asked = f"--cp 2 --cp_comm_type all_gather {words}"
    if not message:
        assert resolved(asked, meta, world=2, platform="cuda").layout.cp == 2
        return
    with pytest.raises(ConfigError, match=message):
        resolved(asked, meta, world=2, platform="cuda")
    assert resolved(asked, meta, world=2).layout.cp == 2


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ("--eval_steps 100 --save_steps 250", 1),
        ("--eval_steps 100 --save_steps 300", 0),
        ("--save_strategy epoch", 0),
        ("--save_strategy epoch --eval_steps 100", 1),
        ("--save_strategy epoch --eval_strategy steps", 1),
        ("--eval_strategy epoch", 1),
        ("--eval_strategy epoch --save_strategy epoch", 0),
        ("--eval_strategy no", 0),
        ("--eval_steps 100 --save_strategy no", 0),
        ("--save_strategy epoch --eval_iters 0", 0),
    ],
)
def test_checkpoints_that_are_not_validated_are_told_of(words: str, notes: int) -> None:
    found = resolved(f"--split_dataset_ratio 0.1 {words}", dense()).notes
    assert sum("not validated" in note for note in found) == notes
    assert not any("not validated" in note for note in resolved(words, dense()).notes)


@pytest.mark.parametrize(
    ("words", "strategy", "steps"),
    [
        ("", "steps", 500),
        ("--save_strategy epoch", "epoch", None),
        ("--save_strategy epoch --eval_steps 9", "steps", 9),
        ("--save_strategy no", "steps", 500),
        ("--eval_strategy no", "no", None),
    ],
)
def test_validations_follow_the_checkpoints(words: str, strategy: str, steps: int | None) -> None:
    chosen = resolved(words, dense()).config.logging
    assert (chosen.eval_strategy, chosen.eval_steps) == (strategy, steps)
    assert (chosen.eval_iters == 0) == (strategy == "no")


def test_steps_between_validations_are_for_those_that_count_them() -> None:
    for strategy in ("epoch", "no"):
        with pytest.raises(ConfigError, match=f"eval_steps=9 is for eval_strategy=steps, not {strategy}"):
            resolved(f"--eval_strategy {strategy} --eval_steps 9", dense())
    with pytest.raises(ConfigError, match="early_stop_interval=2 needs validations"):
        resolved("--split_dataset_ratio 0.1 --eval_strategy no --early_stop_interval 2", dense())


def test_fused_kernels_are_off_on_a_cpu_and_said_so() -> None:
    words = "--attention_backend flash --gradient_accumulation_fusion --moe_permute_fusion"
    on_cpu = resolved(words, moe())
    assert on_cpu.config.model.attention_backend == "auto"
    assert len(on_cpu.notes) == 3
    assert resolved(words, moe(), platform="cuda").config.model.attention_backend == "flash"


def test_the_interleaved_schedule_is_corrected_with_one_line() -> None:
    (note,) = resolved("--pp 2 --vpp 2", dense(), world=2).notes
    assert "overlap_p2p_comm is on and batch_p2p_comm off" in note


def test_router_losses_have_a_kind() -> None:
    assert resolved("", moe()).config.moe.moe_router_load_balancing_type == "none"
    assert (
        resolved("--moe_aux_loss_coeff 0.01", moe()).config.moe.moe_router_load_balancing_type == "aux_loss"
    )


def test_a_run_that_cannot_resume_says_so() -> None:
    (note,) = resolved("--save_optim false", dense()).notes
    assert "cannot resume" in note


def test_resolving_twice_changes_nothing(tmp_path: Any) -> None:
    words = "--tp 2 --gradient_accumulation_steps 4 --recompute_granularity full --warmup_ratio 0.1"
    once = resolved(words, dense(), world=4)
    file = tmp_path / "args.yaml"
    file.write_text(dump_run(once.config))
    assert resolve(parse_run("sft", [str(file)]), dense(), 4, "cpu").config == once.config


@pytest.mark.parametrize(
    ("words", "ranks"),
    [("", 1), ("--tp 2 --pp 2", 4), ("--ep 4", 4), ("--tp 2 --ep 4", 4), ("--tp 2 --ep 3 --pp 2", 12), ("--ep 2 --etp 2 --tp 2", 4)],
)  # fmt: skip
def test_the_smallest_world_holds_one_copy(words: str, ranks: int) -> None:
    assert minimal_world(parse_run("sft", words.split())) == ranks


def test_adapters_that_are_described_are_asked_for() -> None:
    words = [*NEEDED.split(), "--lora_rank", "8"]
    for more in (["--tuner_type", "lora"], ["--train_type", "full"]):
        parsed = parse("sft", [*words, *more])
        adapters_are_asked_for(parsed.config, parsed.given)
    parsed = parse("sft", words)
    with pytest.raises(
        ConfigError, match=r"lora_rank describes adapters, and this run would train in full\. Add"
    ):
        adapters_are_asked_for(parsed.config, parsed.given)
