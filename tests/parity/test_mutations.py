"""Mistakes planted in tables and facts, each caught: by the certificate, by the tensors of the file, or by comparing with transformers."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megaswift.converters import plan
from megaswift.converters.certificate import certify
from megaswift.converters.tables.catalogue import TABLES
from megaswift.errors import WeightsError
from megaswift.mcore.process_groups import initialise
from megaswift.metadata.meta import ModelMeta, RopeScaling
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from megaswift.parity.compare import differences
from megaswift.parity.documents import Outcome
from megaswift.parity.ours import megatron_outcome
from megaswift.parity.reference import transformers_outcome
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny

Plant = Callable[[pytest.MonkeyPatch, ModelMeta], ModelMeta]

# name -> (model, what differs from its tiny config)
VICTIMS: dict[str, tuple[str, dict[str, Any]]] = {
    "square": ("gpt_oss", {"intermediate_size": 64}),  # as the released ones: hidden_size = intermediate_size
}


def rows(ending: str, **changes: Any) -> Plant:
    """Change the rows of the Megatron parameters with this ending."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        table = TABLES[meta.family]
        changed = tuple(
            replace(row, **changes) if row.megatron.endswith(ending) else row for row in table.rows
        )
        assert changed != table.rows, f"{ending} is in no row of {meta.family}"
        patch.setitem(TABLES, meta.family, replace(table, rows=changed))
        return meta

    return plant


def files(ending: str, before: str, after: str) -> Plant:
    """Change the file's names of the Megatron parameters with this ending."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        (name,) = {row.file for row in TABLES[meta.family].rows if row.megatron.endswith(ending)}
        assert before in name
        return rows(ending, file=name.replace(before, after))(patch, meta)

    return plant


def swapped(one: str, other: str) -> Plant:
    """Let two Megatron parameters take each other's tensors."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        found = {row.megatron: row.file for row in TABLES[meta.family].rows}
        rows(one, file=found[other])(patch, meta)
        return rows(other, file=found[one])(patch, meta)

    return plant


def without(ending: str) -> Plant:
    """Forget the rows with this ending, and that the file has such tensors."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        table = TABLES[meta.family]
        kept = tuple(row for row in table.rows if not row.megatron.endswith(ending))
        assert len(kept) < len(table.rows)
        patch.setitem(TABLES, meta.family, replace(table, rows=kept))
        return meta

    return plant


def ignoring(pattern: str, **facts: Any) -> Plant:
    """Take tensors for leftovers, and change facts of the model so that nothing misses them."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        table = TABLES[meta.family]
        patch.setitem(TABLES, meta.family, replace(table, ignored=(*table.ignored, pattern)))
        return fact(**facts)(patch, meta)

    return plant


def fact(**facts: Any) -> Plant:
    """Change facts of the model; section__field names one inside a section."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        for name, value in facts.items():
            section, _, field = name.partition("__")
            if field:
                value = replace(getattr(meta, section), **{field: value})
            assert getattr(meta, section) != value, name
            meta = replace(meta, **{section: value})
        return meta

    return plant


def doubled(ending: str) -> Plant:
    """Have the rows with this ending twice."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        table = TABLES[meta.family]
        again = tuple(row for row in table.rows if row.megatron.endswith(ending))
        patch.setitem(TABLES, meta.family, replace(table, rows=table.rows + again))
        return meta

    return plant


def late_stage(layers: int) -> Plant:
    """Let every stage but the first begin so many layers later."""

    def plant(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
        def shifted(layout: Layout, num_layers: int, *, pp_rank: int, vp_rank: int) -> range:
            right = original(layout, num_layers, pp_rank=pp_rank, vp_rank=vp_rank)
            return range(right.start + (layers if pp_rank else 0), right.stop)

        original = plan.chunk_layers
        patch.setattr(plan, "chunk_layers", shifted)
        return meta

    return plant


def dropped_expert(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
    original = plan._walk
    patch.setattr(
        plan, "_walk", lambda *args, **kwargs: (one for one in original(*args, **kwargs) if one[2] != 1)
    )
    return meta


def reversed_experts(patch: pytest.MonkeyPatch, meta: ModelMeta) -> ModelMeta:
    assert meta.moe is not None
    original, last = plan._tensor_names, meta.moe.num_experts - 1
    patch.setattr(
        plan, "_tensor_names", lambda table, row, layer, expert: original(table, row, layer, last - expert)
    )
    return meta


CERTIFICATE, FILES, PARITY = "certificate", "files", "parity"

# what is wrong -> (model, how it is planted, what catches it)
MUTATIONS: dict[str, tuple[str, Plant, str]] = {
    "a row twice": ("qwen3", doubled("linear_proj.weight"), CERTIFICATE),
    "a stage begins a layer late": ("qwen3", late_stage(1), CERTIFICATE),
    "a stage begins a layer early": ("qwen3", late_stage(-1), CERTIFICATE),
    "an expert dropped": ("qwen3_moe", dropped_expert, FILES),
    "a bias without a row": ("qwen2", without("linear_qkv.bias"), FILES),
    "a bias that the facts do not know": ("qwen2", fact(qkv_bias=False), FILES),
    "the first dense layer takes experts": (
        "deepseek_v3", fact(moe__layer_is_moe=(True, True, True, True)), FILES,
    ),
    "experts in reverse": ("qwen3_moe", reversed_experts, PARITY),
    "gate and up swapped": ("qwen3", files("mlp.linear_fc1.weight", "{gate,up}", "{up,gate}"), PARITY),
    "gate and up of experts swapped": (
        "qwen3_moe", files("local_experts.#.linear_fc1.weight", "{gate,up}", "{up,gate}"), PARITY,
    ),
    "gate and up below each other": ("gpt_oss", rows("linear_fc1.weight", interleaved=False), PARITY),
    "a square matrix transposed": ("square", rows("linear_fc2.weight", transposed=False), PARITY),
    "q, k and v not grouped": ("qwen3", rows("linear_qkv.weight", per=""), PARITY),
    "k and v swapped": ("qwen3", files("linear_qkv.weight", "{q,k,v}", "{q,v,k}"), PARITY),
    "norms of q and k swapped": (
        "qwen3", swapped("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"), PARITY,
    ),
    "norms of the branches swapped": (
        "qwen3", swapped("input_layernorm.weight", "pre_mlp_layernorm.weight"), PARITY,
    ),
    "halves turned in place of neighbours": ("glm4", fact(rope__interleaved=False), PARITY),
    "neighbours turned in place of halves": ("qwen3", fact(rope__interleaved=True), PARITY),
    "another base of the rotary positions": ("qwen3", fact(rope_theta=500000.0), PARITY),
    "the stretching of positions forgotten": ("llama3-rope", fact(rope_scaling=None), PARITY),
    "a window one token longer": ("mistral-window", fact(sliding_window=(9, 9, 9, 9)), PARITY),
    "another epsilon": ("qwen3", fact(norm_eps=1e-5), PARITY),
    "norm weights taken as they are": ("gemma2", fact(norm__zero_centered=False), PARITY),
    "scores without their cap": ("gemma2", fact(attention__softcap=None), PARITY),
    "embeddings not multiplied": ("gemma2", fact(multipliers__embedding=1.0), PARITY),
    "the choice's bias taken for a leftover": (
        "deepseek_v3", ignoring(r".*e_score_correction_bias", moe__router_bias=False), PARITY,
    ),
    "groups of experts forgotten": ("deepseek_v3", fact(moe__num_groups=None, moe__topk_groups=None), PARITY),
    "chosen weights not scaled": ("deepseek_v3", fact(moe__routed_scaling_factor=1.0), PARITY),
    "chosen weights not normalised": ("qwen3_moe", fact(moe__norm_topk_prob=False), PARITY),
    "the gate of the shared expert taken for a leftover": (
        "qwen2_moe", ignoring(r".*shared_expert_gate\.weight", moe__shared_gate=False), PARITY,
    ),
    "sinks taken for leftovers": (
        "gpt_oss",
        lambda patch, meta: ignoring(r".*\.sinks", attention__sinks=False)(
            patch, without("softmax_offset")(patch, meta)
        ),
        PARITY,
    ),
    "gates of attention below the queries": ("qwen3_next", rows("linear_qkv.weight", by_head=False), PARITY),
    "projections of key heads not together": ("qwen3_5_text", rows("in_proj_qkvz.weight", per=""), PARITY),
    "b and a swapped": ("qwen3_5_text", files("in_proj_ba.weight", "{b,a}", "{a,b}"), PARITY),
    "norms before the dense part and the experts swapped": (
        "gemma4_text", swapped("mlp.dense_input_norm.weight", "mlp.expert_input_norm.weight"), PARITY,
    ),
    "norms behind the dense part and the experts swapped": (
        "gemma4_text", swapped("mlp.dense_output_norm.weight", "mlp.expert_output_norm.weight"), PARITY,
    ),
    "scales of experts that the facts do not know": ("gemma4_text", fact(moe__expert_scale=False), FILES),
    "the number of a layer without a row": ("gemma4_text", without("layer_scalar"), FILES),
    "sliding layers turned like full attention": ("gemma4_text", fact(rope__local_theta=None), PARITY),
    "the whole of a head turned": (
        "gemma4_text", fact(rope_scaling=RopeScaling(kind="proportional", proportion=1.0)), PARITY,
    ),
    "rows of keys and queries not grouped": ("gemma4_text-dense", rows("linear_qkv.weight", per=""), PARITY),
    "convolution of key heads not together": ("qwen3_next", rows("conv1d.weight", per=""), PARITY),
}  # fmt: skip
LAYOUTS = (Layout(), Layout(world=2, tp=2), Layout(world=2, pp=2))


@cache
def victim(name: str) -> tuple[Path, Outcome]:
    """Return a tiny model's folder and what transformers makes of it."""
    scratch = Path(_scratch().name) / name
    model, differs = VICTIMS.get(name, (name, {}))
    folder = save_tiny(model, scratch / "model", **differs)
    return folder, transformers_outcome(folder, scratch / "theirs")


@cache
def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="megaswift-mutations-")


def examine(
    rank: int, world_size: int, folder: Path, theirs: Outcome, scratch: Path, name: str | None
) -> str:
    """Plant a mistake and return what catches it, with its words."""
    initialise(Layout(), seed=1, timeout_min=2)
    with pytest.MonkeyPatch.context() as patch:
        meta = get_model_meta(folder)
        if name is not None:
            meta = MUTATIONS[name][1](patch, meta)
        try:
            for layout in LAYOUTS:
                certify(meta, layout)
        except WeightsError as error:
            return f"{CERTIFICATE}: {error}"
        try:
            ours = megatron_outcome(meta, folder, scratch)
        except WeightsError as error:
            return f"{FILES}: {error}"
        return "".join(f"{PARITY}: {fault}\n" for fault in differences(ours, theirs)[:1])


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_caught(name: str, tmp_path: Path) -> None:
    model, _, catcher = MUTATIONS[name]
    [found] = run_distributed(examine, 1, *victim(model), tmp_path / "ours", name)
    assert found.startswith(catcher), found or "nothing noticed it"


@pytest.mark.parametrize("model", sorted({model for model, _, _ in MUTATIONS.values()}))
def test_models_without_a_mistake_pass(model: str, tmp_path: Path) -> None:
    [found] = run_distributed(examine, 1, *victim(model), tmp_path / "ours", None)
    assert found == ""
