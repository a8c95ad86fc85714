"""Whole runs of `megaswift rlhf --rlhf_type grpo` in miniature: completions and losses of every layout are those of one rank,
stopping changes nothing, and rewards that fail say where."""

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megaswift.config.parse import parse_run
from megaswift.data.tokenizer import load_tokenizer
from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run, save_tiny_scorer
from tests.harness.training import temporary_folder

# float32 sums in another order, a few Adam steps apart.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
STEPS, SEED = 3, 42
PLUGIN = '''
def brief(completions, **columns):
    """Fewer words are better."""
    return [-0.1 * len(text.split()) for text in completions]


def near(completions, goal, **columns):
    """As many letters e as the row asks for."""
    return [-abs(text.count("e") - wanted) for text, wanted in zip(completions, goal)]


def again(messages, completion, goal, **columns):
    """Ask for more as long as an e is missing."""
    return None if completion.count("e") > goal else "First, " + completion[:3]


def curt(completions, completion_ids, **columns):
    """It ends at once: for most groups the same for all."""
    return [float(len(ids) < 2) for ids in completion_ids]


def broken(completions, goal, **columns):
    return [wanted / 0 for wanted in goal]


class Letters:
    """Ask for letters e until there are enough of them, half a point each; a turn costs a quarter."""

    def __init__(self, env_config):
        self.left = env_config["letters"]

    async def reset(self, config):
        return f"{self.left} e", {"goal": config.data_dict["goal"]}, "Go" if self.left > 1 else None

    async def step(self, action):
        found = action[-1]["content"].count("e")
        self.left -= found
        return f"{self.left} more", 0.5 * found - 0.25, self.left <= 0, {"found": found}

    async def close(self):
        pass


class Curt(Letters):
    """The same about the question of the row."""

    async def reset(self, config):
        return None
'''
CALM = ("--adam_eps", "1e-3")  # gradients that are 0 but for rounding move nothing
CALMER = ("--adam_eps", "1e-6")  # enough where all parameters train, and the others still move
LORA = ("--tuner_type", "lora", "--lora_dropout", "0", *CALM)
# what is trained -> flags
TRAININGS: dict[str, tuple[str, ...]] = {
    "grpo": CALMER,
    "lora": LORA,
    "twice": ("--num_iterations", "2", "--kl_in_reward", "true", "--importance_sampling_level", "sequence", *CALM),
    "rloo": ("--advantage_estimator", "rloo", "--beta", "0", "--loss_type", "dapo", "--temperature", "0.7", "--top_k", "40",
             *CALMER),
}  # fmt: skip
# what is trained besides: on conversations of several turns and with a reward model; on shares of generations, whose tokens have
# second thoughts, half of which the model is too sure of; by forms of the loss that look beyond a token -> flags
TALKS: dict[str, tuple[str, ...]] = {
    "talks": ("--multi_turn_scheduler", "{folder}/plugin.py:again", "--max_turns", "3", "--reward_model", "{folder}/rm",
              "--reward_weights", "1", "0.5", "2", "--num_iterations", "2", *CALM),
    "shares": ("--generation_batch_size", "16", "--loss_type", "dapo", "--delta", "1.25", "--top_entropy_quantile", "0.5",
               "--log_entropy", "true", "--off_policy_sequence_mask_delta", "1e-3", "--repetition_penalty", "1.3", *CALM),
    # What a token's weight is made of comes behind it, and what a completion's score is compared with may be on any rank.
    "future": ("--loss_type", "fipo", "--num_iterations", "2", "--fipo_decay_rate", "3", "--fipo_clip_range", "none",
               "--scale_rewards", "gdpo", *CALM),
    "labels": ("--loss_type", "real", "--num_iterations", "2", "--log_entropy", "true", *CALM),
    "games": ("--use_gym_env", "true", "--gym_env", "Letters", "--multi_turn_scheduler", "gym_scheduler", "--max_turns", "3",
              "--reward_weights", "1", "0.5", "2", "--num_iterations", "2", *CALM),
}  # fmt: skip
CP2 = ("--context_parallel_size", "2", "--cp_comm_type", "p2p")
ASIDE = ("--offload_model", "true", "--offload_optimizer", "true")
PACKED = ("--packing", "true", "--max_length", "40")
# layout -> (ranks, flags)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "dp2 aside": (2, ASIDE),
    "tp2": (2, ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")),
    "pp2": (2, ("--pipeline_model_parallel_size", "2")),
    "vpp2": (2, ("--pipeline_model_parallel_size", "2", "--virtual_pipeline_model_parallel_size", "2")),
    "ep2": (2, ("--expert_model_parallel_size", "2")),
    "cp2": (2, CP2),
    "tp2 pp2": (4, ("--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2")),
    "packed": (1, PACKED),
    "dp2 packed": (2, PACKED),
    "cp2 packed": (2, (*CP2, *PACKED)),
    "vpp2 packed": (2, ("--pipeline_model_parallel_size", "2", "--virtual_pipeline_model_parallel_size", "2", *PACKED)),
}  # fmt: skip
ON_TWO = [
    ("grpo", "dp2 aside"),
    ("grpo", "tp2"),
    ("grpo", "pp2"),
    ("lora", "tp2"),
    ("lora", "dp2 aside"),
    ("twice", "pp2"),
    ("rloo", "dp2"),
    ("rloo", "vpp2"),
    ("lora", "cp2"),
    ("twice", "cp2 packed"),
    ("twice", "dp2 packed"),
    ("rloo", "vpp2 packed"),
    ("talks", "tp2"),
    ("talks", "cp2"),
    ("shares", "tp2"),
    ("shares", "cp2 packed"),
    ("shares", "dp2 packed"),
]
BEYOND = [("future", "cp2 packed"), *(("labels", where) for where in ("dp2 packed", "cp2 packed", "pp2"))]
GAMES = [("games", where) for where in ("tp2", "pp2", "cp2", "dp2")]
OTHERS = [
    *ON_TWO,
    *BEYOND,
    *GAMES,
    ("lora", "packed"),
    ("twice", "packed"),
    ("twice", "tp2 pp2"),
    ("shares", "tp2 pp2"),
]
TIMED = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")


@cache
def folder() -> Path:
    """A model that often stops early, prompts with a column for rewards, and a file of reward functions."""
    folder = temporary_folder()
    model, rows = make_tiny_run(folder, rows=12)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(20, 50)]}))
    with (folder / "prompts.jsonl").open("w") as file:
        for number, line in enumerate(rows.read_text().splitlines()):
            messages = json.loads(line)["messages"]
            environment = {"letters": 1 + number % 3, **({"name": "Curt"} if number % 4 == 3 else {})}
            row = {"messages": messages[: 1 + number % 2], "goal": number % 4, "env_config": environment}
            file.write(json.dumps(row) + "\n")
    (folder / "plugin.py").write_text(PLUGIN)
    save_tiny_scorer(model, folder / "rm")
    return folder


def flags(training: str, layout: str, *more: str, output: str | None = None) -> list[str]:
    return [
        "--rlhf_type", "grpo", "--model", str(folder() / "model"), "--dataset", str(folder() / "prompts.jsonl"),
        "--output_dir", str(folder() / (output or f"{training} {layout}")), "--train_iters", str(STEPS),
        "--global_batch_size", "8", "--num_generations", "4", "--micro_batch_size", "2", "--max_completion_length", "10",
        "--learning_rate", "1e-2", "--lr_decay_style", "constant", "--save_steps", "1", "--logging_steps", "1",
        "--report_to", "none", "--log_completions", "true", "--external_plugins", str(folder() / "plugin.py"),
        "--reward_funcs", "near", "brief", *(() if training in ("talks", "games") else ("--reward_weights", "1", "0.5")),
        *(word.format(folder=folder()) for word in {**TRAININGS, **TALKS}[training]), *LAYOUTS[layout][1], *more,
    ]  # fmt: skip


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    every = [*((training, "one") for training in (*TRAININGS, *TALKS)), *OTHERS]
    cases = [(training, layout) for training, layout in every if LAYOUTS[layout][0] == ranks]
    run_distributed(
        train_all, ranks, [parse_run("rlhf", flags(training, layout)) for training, layout in cases]
    )


def table(training: str, layout: str, name: str) -> list[dict[str, Any]]:
    """Return the lines of a file of a run."""
    trained(LAYOUTS[layout][0])
    return [json.loads(line) for line in (folder() / f"{training} {layout}" / name).read_text().splitlines()]


def figures(training: str, layout: str) -> list[dict[str, Any]]:
    lines = table(training, layout, "logging.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize(("training", "layout"), OTHERS)
def test_layout_generates_and_trains_like_one_rank(training: str, layout: str) -> None:
    found, expected = (table(training, where, "completions.jsonl") for where in (layout, "one"))
    assert [row["completion"] for row in found] == [row["completion"] for row in expected]
    for line, one in zip(figures(training, layout), figures(training, "one"), strict=True):
        for name, value in one.items():
            tolerance = NORM_TOLERANCE if name == "grad_norm" else LOSS_TOLERANCE
            assert line[name] == pytest.approx(value, rel=tolerance, abs=LOSS_TOLERANCE), name


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_experts_spread_over_ranks_generate_and_train_like_one_rank() -> None:
    model, _ = make_tiny_run(temporary_folder(), name="qwen3_moe")
    for layout in ("one", "ep2"):
        words = flags("rloo", layout, output=f"experts {layout}")
        words[words.index("--model") + 1] = str(model)
        run_distributed(train_all, LAYOUTS[layout][0], [parse_run("rlhf", words)])
    found, expected = (table("experts", where, "completions.jsonl") for where in ("ep2", "one"))
    assert [row["completion"] for row in found] == [row["completion"] for row in expected]
    for line, one in zip(figures("experts", "ep2"), figures("experts", "one"), strict=True):
        assert line["loss"] == pytest.approx(one["loss"], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
        assert line["grad_norm"] == pytest.approx(one["grad_norm"], rel=NORM_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_table_and_figures_tell_the_same(training: str) -> None:
    """Groups lie together, goals come from the rows, and nothing is logged that the completions do not show."""
    rows, lines = table(training, "one", "completions.jsonl"), figures(training, "one")
    uses = 2 if training == "twice" else 1
    assert len(rows) == 8 * -(-STEPS // uses)
    assert len({row["completion"] for row in rows[:4]}) == 4, "a group's completions differ"
    assert len({row["tokens"] for row in rows}) > 3, "lengths differ, or packing would be easy"
    goals = [json.loads(line)["goal"] for line in (folder() / "prompts.jsonl").read_text().splitlines()]
    for row in rows:
        goal = goals[int(row["source"].rpartition(":")[2]) - 1]
        brief = -0.1 * len(row["completion"].split())
        assert row["rewards"] == {"near": -abs(row["completion"].count("e") - goal), "brief": brief}
    for number, line in enumerate(lines):
        own = rows[number // uses * 8 :][:8]
        rewards = [row["rewards"]["near"] + 0.5 * row["rewards"]["brief"] for row in own]
        assert line["reward"] == pytest.approx(statistics.mean(rewards))
        assert line["rewards/near/std"] == pytest.approx(
            statistics.stdev(row["rewards"]["near"] for row in own)
        )
        assert line["completions/mean_length"] == statistics.mean(row["tokens"] for row in own)
        assert line["loss_tokens"] == sum(row["tokens"] for row in own)
        assert sum(row["advantage"] for row in own[:4]) == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] != lines[0]["loss"]
    assert lines[0]["grad_norm"] > 0


@pytest.mark.slow
def test_steps_share_out_a_generation_and_tokens_that_the_model_is_sure_of_are_left_out() -> None:
    """Step 1 and 2 take the first and second half of 16 completions, step 3 new ones; the entropy is that of the exported model."""
    rows, lines = table("shares", "one", "completions.jsonl"), figures("shares", "one")
    assert [row["step"] for row in rows] == [1] * 16 + [3] * 16
    assert [line["loss_tokens"] for line in lines] == [
        sum(row["tokens"] for row in rows[first : first + 8]) for first in (0, 8, 16)
    ]
    assert lines[0]["reward"] == lines[1]["reward"] != lines[2]["reward"]
    assert lines[0]["off_policy/masked"] == 0, "the model is still the one that wrote them"
    assert lines[1]["off_policy/masked"] > 0
    tokenizer = load_tokenizer(folder() / "model")
    prompts = [
        np.array(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True).input_ids)
        for row in rows[:16]
    ]
    draws = [chances((SEED, place // 4, place % 4), length=10) for place in range(16)]
    sampling = Sampling(
        temperature=0.9,
        top_p=1,
        top_k=-1,
        max_tokens=10,
        stop_ids=(2, *range(20, 50)),
        repetition_penalty=1.3,
    )
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder() / "model", folder() / "shares one" / "checkpoint-1" / "hf")
    )
    ids = complete(first, prompts, draws, sampling, pad_id=0)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [row["completion"] for row in rows[:16]]
    every, means = [], []
    for prompt, answer in zip(prompts[8:], ids[8:], strict=True):
        with torch.no_grad():
            logits = second(torch.tensor([[*prompt.tolist(), *answer]])).logits[0, len(prompt) - 1 : -1]
        log_p = (logits.double() / 0.9).log_softmax(-1)
        own = (-(log_p.exp() * log_p).sum(-1)).tolist()
        every += own
        means.append(statistics.mean(own))
    assert lines[1]["entropy/mean"] == pytest.approx(statistics.mean(means), rel=LOSS_TOLERANCE)
    assert lines[1]["entropy/max"] == pytest.approx(max(means), rel=LOSS_TOLERANCE)
    assert lines[1]["entropy/threshold"] == pytest.approx(statistics.median(every), rel=LOSS_TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_turns_are_rewarded_together_and_learnt_without_what_was_said_between() -> None:
    rows, lines = table("talks", "one", "completions.jsonl"), figures("talks", "one")
    assert {len(row["turns"]) for row in rows} > {1, 3}, "some conversations end at once, some go on"
    scorer = AutoModelForSequenceClassification.from_pretrained(folder() / "rm", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder() / "model")
    for row in rows:
        own = [turn["content"] for turn in row["turns"] if turn["role"] == "assistant"]
        said = [turn["content"] for turn in row["turns"] if turn["role"] == "user"]
        assert row["completion"] == own[-1] and said == [f"First, {text[:3]}" for text in own[:-1]]
        ids = tokenizer.apply_chat_template([*row["prompt"], *row["turns"]]).input_ids
        score = float(scorer(torch.tensor([ids])).logits[0, 0])
        assert row["rewards"]["reward_model"] == pytest.approx(score, abs=LOSS_TOLERANCE)
    for number, line in enumerate(lines):
        own = rows[number // 2 * 8 :][:8]
        assert line["loss_tokens"] == sum(row["tokens"] for row in own)
        assert line["tokens"] > line["loss_tokens"]
        scores = [row["rewards"]["reward_model"] for row in own]
        assert line["rewards/reward_model/mean"] == pytest.approx(statistics.mean(scores))
        total = [
            row["rewards"]["near"] + 0.5 * row["rewards"]["brief"] + 2 * row["rewards"]["reward_model"]
            for row in own
        ]
        assert line["reward"] == pytest.approx(statistics.mean(total))


@pytest.mark.slow
@pytest.mark.parametrize("training", ["grpo", "lora", "rloo"])
def test_completions_are_those_of_the_exported_model(training: str) -> None:
    """What the shards of step 2 generated for step 3 is what transformers samples from the export of step 2."""
    rows = table(training, "one", "completions.jsonl")[-8:]
    newest = folder() / f"{training} one" / f"checkpoint-{STEPS - 1}"
    if training == "lora":
        base = AutoModelForCausalLM.from_pretrained(folder() / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(newest / "adapter")).merge_and_unload().eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(newest / "hf", dtype=torch.float32).eval()
    run = parse_run("rlhf", flags(training, "one"))
    tokenizer = load_tokenizer(folder() / "model")
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True).input_ids for row in rows
    ]
    draws = [
        chances((run.training.seed, (STEPS - 1) * 2 + place // 4, place % 4), length=10) for place in range(8)
    ]
    chosen = run.rollout
    sampling = Sampling(
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        max_tokens=10,
        stop_ids=(2, *range(20, 50)),
    )
    ids = complete(model, [np.array(one) for one in prompts], draws, sampling, pad_id=0)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [row["completion"] for row in rows]
    first = table(training, "one", "completions.jsonl")[:8]
    assert [row["completion"] for row in first] != [row["completion"] for row in rows]


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("training", "layout", "step"),
    [("grpo", "one", 2), ("lora", "cp2", 2), ("twice", "one", 1), ("twice", "cp2 packed", 1), ("shares", "cp2 packed", 1),
     ("games", "one", 1)],
)  # fmt: skip
def test_resumed_run_repeats_every_figure_and_completion(training: str, layout: str, step: int) -> None:
    """`twice` goes on amid completions that it has used once, `shares` with the second half of them."""
    before = figures(training, layout), table(training, layout, "completions.jsonl")
    for later in range(step + 1, STEPS + 1):
        (folder() / f"{training} {layout}" / f"checkpoint-{later}" / "manifest.json").unlink()
    run_distributed(train_all, LAYOUTS[layout][0], [parse_run("rlhf", flags(training, layout))])
    assert (figures(training, layout), table(training, layout, "completions.jsonl")) == before


@pytest.mark.slow
def test_the_mean_reward_rises() -> None:
    """Shorter completions are better: the model learns to stop."""
    words = [*flags("rloo", "one", output="short"), "--overlong_filter", "true"]
    start = words.index("--external_plugins")
    del words[start : words.index("0.5") + 1]
    words[words.index("--train_iters") + 1], words[words.index("--save_steps") + 1] = "16", "16"
    words += ["--reward_funcs", "soft_overlong", "--soft_cache_length", "10"]
    run_distributed(train_all, 1, [parse_run("rlhf", words)])
    lines = [json.loads(line) for line in (folder() / "short" / "logging.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines]
    assert statistics.mean(rewards[-4:]) > rewards[0] + 0.2, (
        "the first completions are those of the model as it was"
    )
    for number, line in enumerate(lines):
        rows = (
            (folder() / "short" / "completions.jsonl").read_text().splitlines()[8 * number : 8 * number + 8]
        )
        tokens = [json.loads(row)["tokens"] for row in rows]
        cut = round(8 * line["completions/clipped_ratio"])
        assert line["loss_tokens"] == sum(tokens) - 10 * cut, "what was cut off carries no loss"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_groups_that_are_all_worth_the_same_give_way_to_other_prompts() -> None:
    """The same on two ranks; what is left of dull groups was dull in every round."""
    runs = {"dull": "one", "lively": "one", "lively dp2": "dp2"}
    for name, layout in runs.items():
        words = flags("rloo", layout, "--dynamic_sample", str(name != "dull").lower(), output=name)
        start = words.index("--reward_funcs")
        words[start : start + 6] = ["--reward_funcs", "curt"]
        words[words.index("--global_batch_size") + 1] = "16"
        run_distributed(train_all, LAYOUTS[layout][0], [parse_run("rlhf", words)])
    (dull, lively, lively_dp2), (lines, better, _) = (
        [[json.loads(line) for line in (folder() / run / file).read_text().splitlines()] for run in runs]
        for file in ("completions.jsonl", "logging.jsonl")
    )
    assert [row["completion"] for row in lively] == [row["completion"] for row in lively_dp2]
    assert better[0]["frac_reward_zero_std"] < lines[0]["frac_reward_zero_std"]
    groups = [(dull[start : start + 4], lively[start : start + 4]) for start in range(0, 16, 4)]
    for before, after in groups:
        was_dull = len({row["rewards"]["curt"] for row in before}) == 1
        assert was_dull or before == after, "what has a spread stays"
        assert len({row["source"] for row in after}) == 1
    assert any(before[0]["source"] != after[0]["source"] for before, after in groups)
