"""GRPO's losses and gradients against TRL's own trainer: same weights, same completions, same advantages, same older policies."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from megaswift.data.batches import BatchSettings
from megaswift.rollout.rollout import Rollout
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_judged, temporary_folder
from tests.parity.test_trl import TOLERANCE, agree, loss_and_norm, model, options, tokenizer

ROWS, LONGEST, TEMPERATURE = 8, 32, 0.7
# name -> settings of ours by section, and of TRL
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo", "beta": 0.1}, {}, {"loss_type": "grpo", "beta": 0.1}),
    "bnpo": ({"loss_type": "bnpo", "beta": 0.0}, {}, {"loss_type": "bnpo", "beta": 0.0}),
    "dr_grpo": ({"loss_type": "dr_grpo", "beta": 0.0}, {}, {"loss_type": "dr_grpo", "beta": 0.0}),
    "dapo": (
        {"loss_type": "dapo", "beta": 0.0},
        {"epsilon_high": 0.28},
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
    ),
    "gspo": (
        {"loss_type": "grpo", "beta": 0.1},
        {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.04},
        {
            "loss_type": "grpo",
            "beta": 0.1,
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "epsilon_high": 0.04,
        },
    ),
    "two-sided": (
        {"loss_type": "grpo", "beta": 0.1},
        {"delta": 1.3},
        {"loss_type": "grpo", "beta": 0.1, "delta": 1.3},
    ),
    "masked": (
        {"loss_type": "grpo", "beta": 0.1},
        {"off_policy_sequence_mask_delta": 0.02, "num_iterations": 2},
        {"loss_type": "grpo", "beta": 0.1, "off_policy_mask_threshold": 0.02},
    ),
    "unsure": (
        {"loss_type": "dapo", "beta": 0.1},
        {"top_entropy_quantile": 0.3},
        {"loss_type": "dapo", "beta": 0.1, "top_entropy_quantile": 0.3},
    ),
    "cispo": (
        {"loss_type": "cispo", "beta": 0.1},
        {"epsilon_high": 1.1},
        {"loss_type": "cispo", "beta": 0.1, "epsilon_high": 1.1},
    ),
    "sapo": (
        {"loss_type": "sapo", "beta": 0.1},
        {},
        {"loss_type": "sapo", "beta": 0.1, "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.0},
    ),
    **{
        mode: (
            {"loss_type": "grpo", "beta": 0.1},
            {},
            {"loss_type": "grpo", "beta": 0.1, "vllm_importance_sampling_mode": mode},
        )
        for mode in ("token_truncate", "token_mask")
    },
}
GATES = {"sapo": {"tau_pos": 1.5, "tau_neg": 2.0}}  # what these forms read besides
MOST = 1.1  # threshold of importance weights: some of them are above


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


@cache
def rollout() -> Rollout:
    """Random completions; the older policy and the reference are near the model, as some ratios then are clipped and some are not."""
    encoded = synthetic_judged("kto", rows=ROWS)
    starts = encoded.starts
    policy = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    logps = np.zeros(len(encoded.input_ids), np.float32)
    for start, end in pairwise(starts):
        ids = torch.from_numpy(encoded.input_ids[start:end].astype(np.int64))
        with torch.no_grad():
            log_p = (policy(ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        logps[start + 1 : end] = log_p.gather(1, ids[1:, None])[:, 0].numpy()
    generator = np.random.default_rng(3)
    older, reference = (
        (logps + 0.2 * generator.standard_normal(len(logps))).astype(np.float32) for _ in range(2)
    )
    sampler = (logps + 0.2 * np.random.default_rng(4).standard_normal(len(logps))).astype(np.float32)
    return Rollout(
        position=0,
        group=2,
        input_ids=encoded.input_ids,
        starts=starts,
        prompt_lengths=1 + np.diff(starts) // 3,
        stopped=np.ones(ROWS, bool),
        rewards=np.zeros((ROWS, 1)),
        advantages=generator.standard_normal(ROWS).astype(np.float32),
        old_logps=older,
        reference_logps=reference,
        sampler_logps=sampler,
    )


def first_steps(
    rank: int, world_size: int, model: Path, cases: list[Case], rollouts: list[Rollout]
) -> dict[str, tuple[float, float, dict[str, float]]]:
    """Return loss, gradient norm and what else is logged of the first step of every case on given completions."""
    found = {}
    for case, given in zip(cases, rollouts, strict=True):
        with prepared(model, case, encoded=given.encoded) as trained:
            settings = BatchSettings(global_batch_size=ROWS, micro_batch_size=2)
            batches = list(given.micro_batches(settings, dp_rank=0, dp=1, pad_id=0))
            result = trained.engine.train_step(batches)
            assert result.grad_norm is not None
            found[case.name] = (result.loss, result.grad_norm, result.metrics)
    return found


@cache
def ours() -> dict[str, tuple[float, float, dict[str, float]]]:
    common = {
        "num_generations": 2,
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
    }
    cases = [
        Case(
            name=name,
            task="rlhf",
            settings={
                "preference": {"rlhf_type": "grpo", **preference},
                "rollout": {**common, **more},
                "reward": {"reward_funcs": ["format"]},
                "sampler": corrected(name),
                "policy": GATES.get(name, {}),
                "training": {"global_batch_size": ROWS, "micro_batch_size": 2, "train_iters": 1},
            },
        )
        for name, (preference, more, _) in FORMS.items()
    ]
    given = [rollout() if corrected(name) else replace(rollout(), sampler_logps=None) for name in FORMS]
    return run_distributed(first_steps, 1, folder(), cases, given)[0]


def corrected(name: str) -> dict[str, Any]:
    """Return the settings of what another engine drew."""
    if not name.startswith("token_"):
        return {}
    return {
        "use_vllm": True,
        "rollout_importance_sampling_mode": name,
        "rollout_importance_sampling_threshold": MOST,
    }


def importance_weights(older: torch.Tensor, sampler: torch.Tensor, mode: str) -> torch.Tensor:
    """Return what TRL weights tokens with (GRPOTrainer._generate_and_score_completions, 1.16)."""
    ratio = torch.exp(older - sampler)
    return ratio.clamp(max=MOST) if mode == "token_truncate" else ratio.masked_fill(ratio > MOST, 0.0)


def padded(given: Rollout, name: str) -> dict[str, torch.Tensor]:
    """Return the completions as TRL wants them: prompts padded on the left, completions on the right."""
    longest_prompt, longest = int(given.prompt_lengths.max()), int(given.lengths.max())
    inputs = {
        name: torch.zeros(len(given), width, dtype=torch.long)
        for name, width in (
            ("prompt_ids", longest_prompt),
            ("prompt_mask", longest_prompt),
            ("completion_ids", longest),
            ("completion_mask", longest),
        )
    }
    logps = {
        kind: torch.zeros(len(given), longest)
        for kind in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    }
    tables = (given.old_logps, given.reference_logps, given.sampler_logps)
    for row, (start, prompt, end) in enumerate(
        zip(given.starts, given.prompt_lengths, given.starts[1:], strict=False)
    ):
        inputs["prompt_ids"][row, longest_prompt - prompt :] = torch.from_numpy(
            given.input_ids[start : start + prompt]
        )
        inputs["prompt_mask"][row, longest_prompt - prompt :] = 1
        own = slice(int(start + prompt), int(end))
        inputs["completion_ids"][row, : own.stop - own.start] = torch.from_numpy(given.input_ids[own])
        inputs["completion_mask"][row, : own.stop - own.start] = 1
        for kind, values in zip(logps, tables, strict=True):
            assert values is not None
            logps[kind][row, : own.stop - own.start] = torch.from_numpy(values[own])
    return {
        **inputs,
        **logps,
        "importance_sampling_ratio": importance_weights(
            logps["old_per_token_logps"], logps["sampling_per_token_logps"], name
        ),
        "advantages": torch.from_numpy(given.advantages),
        "num_items_in_batch": inputs["completion_mask"].sum(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_grpo_has_the_loss_and_gradient_of_trl(name: str, tmp_path: Path) -> None:
    settings = options(
        tmp_path, num_generations=2, per_device_train_batch_size=ROWS, max_completion_length=LONGEST,
        temperature=TEMPERATURE, gradient_accumulation_steps=1, use_bias_correction_kl=False, **FORMS[name][2],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model(folder()), lambda completions, **columns: [0.0] * len(completions), args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": "a"}]), processing_class=tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    inputs = padded(rollout(), name)
    if corrected(name):
        trainer.use_vllm = True  # as if it had generated with it
    else:
        del inputs["sampling_per_token_logps"]
    expected = loss_and_norm(trainer, inputs)
    loss, norm, logged = ours()[name]
    agree((loss, norm), expected)
    assert name != "masked" or 0 < logged["off_policy/masked"] < 0.5
    clipped = sum(value for kind, value in logged.items() if "clip_ratio" in kind)
    assert (0 < clipped < 0.9 or name == "sapo") and TOLERANCE <= 1e-5


@pytest.mark.slow
def test_the_mismatch_of_sampler_and_model_is_logged_over_all_micro_batches() -> None:
    given = rollout()
    assert given.old_logps is not None and given.sampler_logps is not None
    own = np.concatenate(
        [
            np.arange(start + prompt, end)
            for start, prompt, end in zip(given.starts, given.prompt_lengths, given.starts[1:], strict=False)
        ]
    )
    log_ratio = given.old_logps[own].astype(np.float64) - given.sampler_logps[own]
    expected = {
        "sampling/importance_sampling_ratio/max": np.exp(log_ratio).max(),
        "sampling/importance_sampling_ratio/mean": np.exp(log_ratio).mean(),
        "sampling/sampling_logp_difference/mean": np.abs(log_ratio).mean(),
        "sampling/kl": (np.exp(log_ratio) - log_ratio - 1).mean(),
    }
    logged = ours()["token_mask"][2]
    assert {name: logged[name] for name in expected} == pytest.approx(expected)
    assert not any(name.startswith("sampling/") for name in ours()["grpo"][2])
