"""Settings: learning from preferences."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Which preference loss trains the model, and against which reference (`megaswift rlhf`)."""

    rlhf_type: str = setting(
        "dpo", "what to optimise", choices=("dpo", "orpo", "simpo", "cpo", "kto", "rm", "grpo", "gkd")
    )
    loss_type: str | None = setting(
        None,
        "form of the loss: sigmoid, ipo, hinge, robust, sigmoid_norm, exo_pair, discopop, nca_pair, bco_pair, sppo_hard, "
        "apo_zero, apo_down or sft for dpo, of which there may be several, sigmoid, hinge or ipo for cpo, "
        "kto or apo_zero_unpaired for kto, grpo, bnpo, dr_grpo, dapo, cispo, sapo, fipo or real for grpo, infonce, cosine_similarity or contrastive "
        "for --task_type embedding, pointwise_reranker or listwise_reranker for rerankers; default: the first",
        several=True,
    )
    loss_weights: list[str] = setting([], "dpo: a number for each of several --loss_type; default: 1 each")
    ld_alpha: float | None = setting(
        None,
        "dpo: weight of the tokens of the longer answer behind as many as the shorter has (LD-DPO), 0 to 1; default: as the others",
    )
    beta: float | None = setting(
        None,
        "strength of the preference against the reference; default 0.1, for simpo 2, for grpo 0.04 (0: no reference); for gkd "
        "the share of the teacher in the mixture, default 0.5 (0: KL(teacher || student), 1: the reverse)",
    )
    label_smoothing: float = setting(
        0.0, "share of pairs whose answers may be swapped (dpo sigmoid, robust and exo_pair, cpo, simpo)"
    )
    discopop_tau: float = setting(0.05, "dpo discopop: temperature of the share of its exponential part")
    f_divergence_type: str = setting(
        "reverse_kl",
        "dpo: divergence from the reference (f-DPO)",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = setting(
        0.5, "dpo alpha_divergence: its alpha (1: the reverse KL divergence; towards 0: the forward one)"
    )
    rpo_alpha: float | None = setting(None, "dpo: weight of the chosen answer's negative log-likelihood")
    reference_free: bool = setting(False, "dpo: compare with a uniform reference instead of a model")
    cpo_alpha: float | None = setting(
        None, "weight of the chosen answer's negative log-likelihood; default 1 for cpo, 0 for simpo"
    )
    simpo_gamma: float = setting(1.0, "simpo: margin by which the chosen answer must win")
    desirable_weight: float = setting(1.0, "kto: weight of rows with a true label")
    undesirable_weight: float = setting(1.0, "kto: weight of rows with a false label")
    calculate_kl: bool = setting(
        True, "kto: estimate the divergence from the reference; false: take it as 0", flag="calculate_KL"
    )
    center_rewards_coefficient: float | None = setting(None, "rm: weight that draws the rewards to mean 0")
    ref_model: str | None = setting(
        None, "model of the same kind to compare with; default: --model as it is before training"
    )
    mcore_ref_model: str | None = setting(
        None,
        "Megatron-Core checkpoint with the weights of what the trained model is compared with; its config.json is that of --ref_model, "
        "or of --model",
        aliases=("ref_load",),
    )
    ref_adapters: list[str] = setting(
        [], "PEFT adapter folder that belongs to what the trained model is compared with"
    )
    sync_ref_model: bool = setting(
        False, "dpo and grpo, in full: let the reference follow the trained model (TR-DPO)"
    )
    ref_model_mixup_alpha: float = setting(0.6, "share of the trained model in what the reference becomes")
    ref_model_sync_steps: int = setting(512, "optimizer steps after which it does")
    teacher_model: str | None = setting(
        None,
        "model with the same vocabulary: gkd learns its distributions, and grpo adds to the advantage of each token how much likelier "
        "it finds it (--teacher_kl_coef)",
    )
    teacher_model_server: str | None = setting(
        None,
        "gkd, grpo: address of a vLLM server that has the teacher instead, http://host:port, for gkd with --gkd_logits_topk (and "
        '--max-logprobs of as much there); several share the rows out by tags: [{"url": "http://host:port", "tags": ["a.jsonl"]}, ...]',
    )
    teacher_tag_key: str = setting(
        "dataset",
        "gkd, grpo: column with the tag that says which of several --teacher_model_server teaches the row; dataset: the --dataset it "
        "is of",
    )
    teacher_kl_coef: float = setting(
        1.0, "grpo: weight of log(pi_teacher/pi) of a token in its advantage; without rewards the only lesson"
    )
    offload_teacher_model: bool = setting(
        False, "keep --teacher_model in host memory except while it is asked, once a step"
    )
    sft_alpha: float = setting(
        0.0, "gkd: weight of the cross-entropy of answers by the rows or the teacher beside the divergence"
    )
    lmbda: float = setting(0.5, "gkd: share of the steps on completions by the trained model; 0: none")
    seq_kd: bool = setting(
        False, "gkd: the other steps are on completions by the teacher instead of the rows' own answers"
    )
    gkd_logits_topk: int | None = setting(
        None, "gkd: compare only the teacher's so many likeliest tokens of each place; default: all"
    )
    precompute_ref_log_probs: bool = setting(
        False, "compute the reference's log-probabilities once, to disk, instead of at every step"
    )
