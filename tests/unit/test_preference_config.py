"""Settings of `megaswift rlhf`: defaults of each loss, and what does not belong to it."""

from pathlib import Path

import pytest

from megaswift.config.dump import dump_run
from megaswift.config.loss_forms import weighted_forms
from megaswift.config.parse import parse_run, parse_saved
from megaswift.config.reference import has_teacher_here, needs_reference
from megaswift.config.rules import ResolvedRun
from megaswift.config.teachers import TeacherServer, teacher_servers, teachers_by_tag
from megaswift.data.forms import form_of
from megaswift.data.sample import RowError, Sample
from megaswift.errors import ConfigError
from tests.unit.test_config_rules import dense, resolved

SEVERAL = (
    "--rlhf_type gkd --gkd_logits_topk 4 --teacher_model_server "
    '[{"url":"http://a:1","tags":["rows.jsonl"]},{"url":"http://b:1/v1/","tags":["y"]}]'
)


def rlhf(words: str) -> ResolvedRun:
    return resolved(words, dense(), task="rlhf")


@pytest.mark.parametrize(
    ("words", "loss_type", "beta", "cpo_alpha"),
    [
        ("", "sigmoid", 0.1, None),
        ("--rlhf_type dpo --loss_type ipo --beta 0.5", "ipo", 0.5, None),
        ("--rlhf_type orpo", None, 0.1, None),
        ("--rlhf_type simpo", None, 2.0, 0.0),
        ("--rlhf_type cpo", "sigmoid", 0.1, 1.0),
        ("--rlhf_type kto", "kto", 0.1, None),
        ("--rlhf_type gkd --teacher_model t", None, 0.5, None),
    ],
)
def test_each_loss_has_its_defaults(words: str, loss_type: str, beta: float, cpo_alpha: float) -> None:
    chosen = rlhf(words).config.preference
    assert (chosen.loss_type, chosen.beta, chosen.cpo_alpha) == (loss_type, beta, cpo_alpha)


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        ("--rlhf_type dpo", True),
        ("--rlhf_type dpo --tuner_type lora", False),
        ("--rlhf_type dpo --tuner_type lora --modules_to_save embed_tokens", True),
        ("--rlhf_type orpo --tuner_type lora --modules_to_save embed_tokens", False),
    ],
)
def test_a_model_is_its_own_reference_where_adapters_alone_train(words: str, copies: bool) -> None:
    assert needs_reference(rlhf(words).config) is copies


def test_several_forms_of_a_loss_are_one_setting(tmp_path: Path) -> None:
    """In words, in a YAML list, and in what a run writes down."""
    words = "--loss_type sigmoid exo_pair sft --loss_weights 0.8 0.2 1"
    run = rlhf(words).config
    assert (run.preference.loss_type, run.preference.label_smoothing) == ("sigmoid exo_pair sft", 1e-3)
    assert weighted_forms(run.preference) == [("sigmoid", 0.8), ("exo_pair", 0.2), ("sft", 1.0)]
    (tmp_path / "run.yaml").write_text("loss_type: [sigmoid, sft]\n")
    assert parse_run("rlhf", [str(tmp_path / "run.yaml")]).preference.loss_type == "sigmoid sft"
    (tmp_path / "saved.yaml").write_text(dump_run(run))
    assert parse_saved(tmp_path / "saved.yaml").preference == run.preference


def test_apo_needs_no_divergence() -> None:
    assert rlhf("--rlhf_type kto").config.preference.calculate_kl
    assert not rlhf("--rlhf_type kto --loss_type apo_zero_unpaired").config.preference.calculate_kl


def test_rlhf_learns_the_last_answer_unless_told_otherwise() -> None:
    assert rlhf("").config.data.loss_scale == "last_round"
    assert rlhf("--loss_scale default").config.data.loss_scale == "default"


def test_a_pack_holds_both_answers_of_a_pair() -> None:
    assert rlhf("--packing --max_length 100").config.data.packing_length == 200
    assert rlhf("--rlhf_type kto --packing --max_length 100").config.data.packing_length == 100
    with pytest.raises(
        ConfigError, match="packing_length=150 is below 2 x max_length=100: all 2 texts of a row"
    ):
        rlhf("--packing --max_length 100 --packing_length 150")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rlhf_type orpo --loss_type sigmoid", "loss_type=sigmoid: rlhf_type=orpo has one form"),
        ("--loss_type sigmoyd", "loss_type=sigmoyd is not built for rlhf_type=dpo. Did you mean sigmoid?"),
        ("--rlhf_type simpo --rpo_alpha 1", "rpo_alpha=1.0 is for rlhf_type dpo, not simpo"),
        ("--rlhf_type orpo --ref_model m", "ref_model=m is for rlhf_type dpo and kto and grpo, not orpo"),
        ("--beta 0", "beta=0 is too small"),
        ("--rlhf_type gkd", "rlhf_type=gkd needs teacher_model or teacher_model_server"),
        ("--rlhf_type gkd --teacher_model t --teacher_model_server http://a:1", "are two teachers. Give one"),
        ("--rlhf_type gkd --teacher_model_server http://a:1", "Give their number as --gkd_logits_topk"),
        ("--rlhf_type gkd --gkd_logits_topk 4 --teacher_model_server a:1", "teacher_model_server=a:1 is not an address"),
        ('--rlhf_type gkd --gkd_logits_topk 4 --teacher_model_server [{"url":"http://a:1"},{"url":"http://b:1","tags":["x"]}]', "each of several teachers has tags of its own"),
        (SEVERAL.replace('"y"', '"rows.jsonl"') + " --teacher_tag_key c", "gives the tag 'rows.jsonl' twice"),
        ("--rlhf_type gkd --gkd_logits_topk 4 --teacher_model_server [{]", "is not JSON"),
        ('--rlhf_type gkd --gkd_logits_topk 4 --teacher_model_server [{"url":"http://a:1","tag":"x"}]', "Write http://host:port, or"),
        (SEVERAL, "no --dataset is y"),
        (f"{SEVERAL} --val_dataset y z", "dataset=z has no teacher: the tags are rows.jsonl, y. Give the tag z to one"),
        (f"{SEVERAL} --teacher_tag_key c --seq_kd", "seq_kd=true is not built for several teachers"),
        ("--rlhf_type gkd --gkd_logits_topk 4 --teacher_model_server http://a:1 --teacher_tag_key c", "teacher_tag_key=c chooses among several teachers"),
        ("--teacher_model_server http://a:1", "is for rlhf_type gkd and grpo, not dpo"),
        ("--rlhf_type gkd --teacher_model t --lmbda 0 --vllm_server_timeout 5", "vllm_server_timeout=5.0 is for `megaswift rlhf"),
        ("--rlhf_type gkd --teacher_model t --beta 1.5", "beta=1.5 is not a share"),
        ("--teacher_model t", "teacher_model=t is for rlhf_type gkd and grpo, not dpo"),
        ("--rlhf_type gkd --teacher_model t --lmbda 1.5", "lmbda=1.5 is not a share of the steps"),
        ("--rlhf_type gkd --teacher_model t --lmbda 1 --seq_kd", "seq_kd=true has no steps, as lmbda=1 leaves none"),
        ("--rlhf_type gkd --teacher_model t --lmbda 0 --temperature 0.5", "temperature=0.5 is for `megaswift rlhf --rlhf_type grpo, or gkd with --lmbda"),
        ("--rlhf_type gkd --teacher_model t --num_generations 4", "num_generations=4 is for `megaswift rlhf --rlhf_type grpo`"),
        ("--rlhf_type gkd --teacher_model t --tuner_type lora --init_weights lora-ga", "rlhf_type=gkd learns from what models say of them later"),
        ("--rlhf_type gkd --teacher_model t --max_length 100", "max_completion_length=512 leaves no room for a prompt in max_length=100"),
        ("--rlhf_type gkd --teacher_model t --truncation_strategy right", "truncation_strategy=right cuts prompts off"),
        ("--rlhf_type gkd --teacher_model t --streaming --train_iters 3", "streaming=true gives no prompts to complete. Give --lmbda 0"),
        ("--lmbda 0.2", "lmbda=0.2 is for rlhf_type gkd, not dpo"),
        ("--loss_type robust --label_smoothing 0.5", "label_smoothing=0.5 is not from 0 to below 0.5"),
        (
            "--loss_type hinge --label_smoothing 0.1",
            "label_smoothing is for loss_type sigmoid, robust and exo_pair, not hinge",
        ),
        ("--loss_type sigmoid sftt", "loss_type=sftt is not built for rlhf_type=dpo. Did you mean sft?"),
        ("--loss_type sigmoid sigmoid", "loss_type=sigmoid sigmoid names a form twice"),
        ("--rlhf_type cpo --loss_type sigmoid ipo", "only rlhf_type=dpo adds several forms up"),
        ("--loss_type sigmoid sft --loss_weights 1", "loss_weights has 1 numbers for 2 forms: sigmoid sft. Give one each"),
        ("--loss_type sigmoid sft --loss_weights 1 x", "loss_weights=1 x are not numbers"),
        ("--rlhf_type kto --loss_weights 1", "is for rlhf_type dpo, not kto"),
        ("--ld_alpha 1.5", "ld_alpha=1.5 is not from 0 to 1"),
        ("--rlhf_type simpo --ld_alpha 0.5", "ld_alpha=0.5 is for rlhf_type dpo, not simpo"),
        ("--rlhf_type kto --f_divergence_type forward_kl", "is for rlhf_type dpo, not kto"),
        (
            "--loss_type sigmoid nca_pair --f_divergence_type forward_kl",
            "f_divergence_type=forward_kl is for forms that compare two answers, and loss_type nca_pair",
        ),
        ("--f_alpha_divergence_coef 0.2", "f_alpha_divergence_coef=0.2 is for f_divergence_type=alpha_divergence"),
        ("--rlhf_type gkd --teacher_model t --gkd_logits_topk 0", "gkd_logits_topk=0 is too small"),
        ("--rlhf_type gkd --teacher_model t --lmbda 1 --sft_alpha 1", "lmbda=1 leaves none"),
        ("--rlhf_type gkd --teacher_model t --sft_alpha -1", "sft_alpha=-1 is negative"),
        ("--gkd_logits_topk 5", "gkd_logits_topk=5 is for rlhf_type gkd, not dpo"),
        ("--ref_model_sync_steps 5", "ref_model_sync_steps=5 needs sync_ref_model=true"),
        ("--sync_ref_model --ref_model_sync_steps 0", "ref_model_sync_steps=0 is too small"),
        ("--sync_ref_model --ref_model_mixup_alpha 0", "ref_model_mixup_alpha=0 is not above 0"),
        ("--sync_ref_model --tuner_type lora", "sync_ref_model=true moves the weights of a reference in memory"),
        ("--sync_ref_model --reference_free", "sync_ref_model=true moves the weights"),
        ("--rlhf_type kto --sync_ref_model", "sync_ref_model=True is for rlhf_type dpo and grpo, not kto"),
        ("--rpo_alpha -1", "rpo_alpha=-1 is negative"),
        ("--ref_adapters a b", "ref_adapters=a b: the reference has one adapter"),
        ("--rlhf_type rm --ref_adapters a", "is for rlhf_type dpo and kto and grpo, not rm"),
        ("--reference_free --ref_adapters a", "reference_free=true has no reference model"),
        ("--sync_ref_model --ref_adapters a", "sync_ref_model=true moves the weights"),
        ("--reference_free --ref_model m", "reference_free=true has no reference model"),
        ("--calculate_per_token_loss false", "calculate_per_token_loss=false is for token losses"),
        ("--acc_strategy seq", "acc_strategy=seq is for token losses, not for `megaswift rlhf`"),
        ("--eval_metric acc", "eval_metric=acc is not built for this task: validations report the loss. Leave"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("[", r"\[")):
        rlhf(words)


def test_the_default_of_what_counts_as_right_is_harmless() -> None:
    assert rlhf("--acc_strategy token") == rlhf("")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ("", "completions by the trained model in a share of 0.5 of the steps, else the rows' own answers"),
        ("--lmbda 0.25 --seq_kd", "in a share of 0.25 of the steps, else completions by the teacher"),
        ("--lmbda 0", "on the rows' own answers (lmbda=0)"),
        ("--lmbda 0 --seq_kd", "on completions by the teacher (lmbda=0)"),
        ("--lmbda 1 --temperature 0.5 --top_k 10", "on completions by the trained model (lmbda=1)"),
    ],
)
def test_distillation_says_whose_answers_it_learns_from(words: str, texts: str) -> None:
    run = rlhf(f"--rlhf_type gkd --teacher_model t {words}")
    assert any(texts in note for note in run.notes)


def test_teachers_behind_http_are_named_in_the_words_of_ms_swift() -> None:
    alone = rlhf(
        "--rlhf_type gkd --teacher_model_server http://a:1/ --gkd_logits_topk 4 --vllm_server_timeout 5"
    ).config
    assert teacher_servers(alone.preference) == [TeacherServer(url="http://a:1")]
    assert not has_teacher_here(alone) and has_teacher_here(rlhf("--rlhf_type gkd --teacher_model t").config)
    for words in ("--val_dataset HF::y#5", "--teacher_tag_key c"):
        several = rlhf(f"{SEVERAL} {words}").config.preference
        assert [server.url for server in teacher_servers(several)] == ["http://a:1", "http://b:1"]
        assert teachers_by_tag(several) == {"rows.jsonl": 0, "y": 1}


@pytest.mark.parametrize(
    ("words", "samples", "numbers"),
    [
        ("--val_dataset y", [("y", {}), ("rows.jsonl", {"c": "y"})], [1, 0]),
        ("--teacher_tag_key c", [("rows.jsonl", {"c": "y"}), ("y", {"c": "rows.jsonl"})], [1, 0]),
    ],
)
def test_a_row_is_taught_by_whom_its_tag_names(
    words: str, samples: list[tuple[str, dict[str, str]]], numbers: list[int]
) -> None:
    form = form_of(rlhf(f"{SEVERAL} {words}").config)
    rows = [Sample(source="f:1", dataset=name, extras=extras) for name, extras in samples]
    assert [form.target(row) for row in rows] == numbers and all(
        len(form.documents(row)) == 1 for row in rows
    )
    with pytest.raises(RowError, match="and no teacher has this tag"):
        form.documents(Sample(source="f:2", dataset="z", extras={"c": "z"}))
    assert form.name != form_of(rlhf("--rlhf_type gkd --teacher_model t").config).name


def test_other_tasks_have_no_preferences() -> None:
    with pytest.raises(ConfigError, match=r"beta=0\.2 is for `megaswift rlhf`, not `megaswift sft`"):
        resolved("--beta 0.2", dense())


def test_an_adapter_to_start_from_is_said_to_be_no_part_of_the_reference() -> None:
    words = "--tuner_type lora --adapters a"
    assert any("the reference is the model without it" in note for note in rlhf(words).notes)
    assert not any("reference" in note for note in rlhf(f"{words} --ref_model m").notes)


QUANTISED = "--rlhf_type dpo --tuner_type lora --quant_method bnb --quant_bits 4 --init_weights loftq"


def test_a_quantised_base_is_no_reference_for_adapters_that_start_near_the_whole_one() -> None:
    with pytest.raises(
        ConfigError, match=r"no reference for what is trained\. Give --ref_model or --precompute"
    ):
        rlhf(QUANTISED)
    for more in ("--ref_model m", "--precompute_ref_log_probs true", "--reference_free true"):
        assert rlhf(f"{QUANTISED} {more}").config.tuner.init_weights == "loftq"


@pytest.mark.parametrize("kind", ["dpo", "kto", "simpo"])
def test_saved_settings_resolve_to_themselves(kind: str, tmp_path) -> None:
    run = rlhf(f"--rlhf_type {kind}").config
    (tmp_path / "run.yaml").write_text(dump_run(run))
    saved = parse_saved(tmp_path / "run.yaml")
    assert (saved.task, saved.preference, saved.data) == ("rlhf", run.preference, run.data)
    again = resolved(f"--config {tmp_path / 'run.yaml'}", dense(), task="rlhf").config
    assert (again.preference, again.data) == (run.preference, run.data)
