"""The plan of every rank: fused rows where Megatron expects them, every element of the file exactly once."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.converters.certificate import certify
from megaswift.converters.plan import Parameter, file_tensors, plan_chunk
from megaswift.converters.spelling import is_adapter, local_spelling
from megaswift.converters.stripes import Stripe
from megaswift.converters.table import Place
from megaswift.converters.tables.catalogue import TABLES
from megaswift.errors import ConfigError
from megaswift.metadata.meta import AttentionMeta, LayerVariation, LinearAttentionMeta, ModelMeta, MoEMeta
from megaswift.parallel.layout import Layout, coordinates

Array = npt.NDArray[np.int64]


def model(**differs: Any) -> ModelMeta:
    values: dict[str, Any] = {
        "model_type": "llama", "architecture": "", "family": "llama", "folder": None, "num_layers": 4, "hidden_size": 8,
        "ffn_hidden_size": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "vocab_size": 11, "max_length": 64,
    }  # fmt: skip
    return ModelMeta(**{**values, **differs})


def experts(layer_is_moe: tuple[bool, ...] = (False, True, True, True), **differs: Any) -> MoEMeta:
    return MoEMeta(num_experts=4, topk=2, ffn_hidden_size=6, layer_is_moe=layer_is_moe, **differs)


MODELS = {
    "llama": model(),
    "llama-tied": model(tied_embeddings=True),
    "llama-biased": model(qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "qwen3": model(family="qwen3", qk_norm="head"),
    "qwen2_moe": model(
        family="qwen2_moe", qkv_bias=True, moe=experts(shared_ffn_hidden_size=12, shared_gate=True)
    ),
    "mixtral": model(family="mixtral", moe=experts((True,) * 4)),
    "qwen3_next": model(
        family="qwen3_next",
        qk_norm="head",
        attention=AttentionMeta(output_gate=True),
        linear_attention=LinearAttentionMeta(
            layers=(True, False, True, True),
            conv_kernel=3,
            num_key_heads=4,
            num_value_heads=8,
            key_head_dim=2,
            value_head_dim=3,
        ),
        moe=experts(shared_ffn_hidden_size=12, shared_gate=True),
    ),
}
MODELS["gemma4_text"] = model(
    family="gemma4_text",
    qk_norm="head",
    tied_embeddings=True,
    layer_scalar=True,
    attention=AttentionMeta(value_norm=True),
    layer_variation=LayerVariation(
        head_dims=(2, 4, 2, 4),
        num_kv_heads=(2, 1, 2, 1),
        ffn_hidden_sizes=(12,) * 4,
        value_is_key=(False, True, False, True),
        kv_from_layer=(None,) * 4,
    ),
    moe=experts((True,) * 4, beside_dense=True, router_norm=True, expert_scale=True),
)
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "tp4, more ranks than kv heads": Layout(world=4, tp=4),
    "pp2": Layout(world=2, pp=2),
    "pp2 vpp2": Layout(world=2, pp=2, vpp=2),
    "uneven pp": Layout(world=3, pp=3, pp_first=1, pp_last=2),
    "ep2": Layout(world=2, ep=2),
    "tp2 pp2 ep2 etp1": Layout(world=4, tp=2, pp=2, ep=2),
    "tp2 ep2 etp2": Layout(world=4, tp=2, ep=2, etp=2),
}


def plans(meta: ModelMeta, layout: Layout, rank: int) -> dict[str, Parameter]:
    """Return the parameters of all chunks of a rank, by chunk and name."""
    return {
        f"{vp_rank}/{parameter.name}": parameter
        for vp_rank in range(layout.vpp)
        for parameter in plan_chunk(meta, layout, coordinates(layout, rank), vp_rank=vp_rank)
    }


def assemble(parameter: Parameter, tensors: dict[str, Array]) -> Array:
    """Fill a shard from whole tensors, element by element as the plan says; -1 is padding."""
    shard = np.full((parameter.shape[0], int(np.prod(parameter.shape[1:]))), -1)
    for piece in parameter.pieces:
        matrix = tensors[piece.tensor].reshape(tensors[piece.tensor].shape[0], -1)
        sources = [row for begin, end in piece.rows.intervals() for row in range(begin, end)]
        targets = [row for begin, end in piece.into.intervals() for row in range(begin, end)]
        shard[targets, : piece.cols[1] - piece.cols[0]] = matrix[sources, slice(*piece.cols)]
    return shard.reshape(parameter.shape)


def numbered(meta: ModelMeta) -> dict[str, Array]:
    """Return tensors whose elements are all different."""
    filled, offset = {}, 0
    for name, shape in file_tensors(meta).items():
        size = int(np.prod(shape))
        filled[name] = np.arange(offset, offset + size).reshape(shape)
        offset += size
    return filled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_is_certified(name: str, layout: str) -> None:
    meta = MODELS[name]
    certificate = certify(meta, LAYOUTS[layout])
    assert certificate.num_tensors == len(file_tensors(meta))
    assert certificate.num_parameters == sum(int(np.prod(shape)) for shape in file_tensors(meta).values())


@settings(max_examples=80, deadline=None)
@given(
    groups=st.integers(1, 6), queries=st.integers(1, 4), head_dim=st.sampled_from([2, 8]), vocab=st.integers(1, 40),
    tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), tied=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_odd_heads_and_vocabularies_are_certified(
    groups: int, queries: int, head_dim: int, vocab: int, tp: int, pp: int, tied: bool, bias: bool
) -> None:
    meta = model(
        num_kv_heads=groups, num_heads=groups * queries, head_dim=head_dim, vocab_size=vocab, ffn_hidden_size=16,
        tied_embeddings=tied, qkv_bias=bias,
    )  # fmt: skip
    if (queries + 2) * groups * head_dim % tp == 0:
        certify(meta, Layout(world=tp * pp, tp=tp, pp=pp))


@pytest.mark.parametrize("tp", [1, 2])
def test_qkv_is_grouped_by_kv_head(tp: int) -> None:
    meta = model()
    tensors = numbered(meta)
    q, k, v = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"].reshape(2, -1, 8) for name in "qkv")
    fused = np.concatenate([q, k, v], axis=1)  # [G, (H/G + 2) * K, D]
    for rank, expected in enumerate(np.split(fused, tp)):
        shard = assemble(
            plans(meta, Layout(world=tp, tp=tp), rank)["0/decoder.layers.0.self_attention.linear_qkv.weight"],
            tensors,
        )
        assert np.array_equal(shard, expected.reshape(-1, 8))


def test_ranks_beyond_the_kv_heads_hold_contiguous_rows_of_a_group() -> None:
    meta = model()
    tensors = numbered(meta)
    q, k, v = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"].reshape(2, -1, 8) for name in "qkv")
    fused = np.concatenate([q, k, v], axis=1).reshape(-1, 8)
    for rank, expected in enumerate(np.split(fused, 4)):
        name = "0/decoder.layers.0.self_attention.linear_qkv.weight"
        assert np.array_equal(assemble(plans(meta, Layout(world=4, tp=4), rank)[name], tensors), expected)


@pytest.mark.parametrize("tp", [1, 2])
def test_gates_of_attention_lie_below_the_queries_of_their_group(tp: int) -> None:
    meta, tensors = MODELS["qwen3_next"], numbered(MODELS["qwen3_next"])
    shards = [
        assemble(
            plans(meta, Layout(world=tp, tp=tp), rank)["0/decoder.layers.1.self_attention.linear_qkv.weight"],
            tensors,
        )
        for rank in range(tp)
    ]
    q, k, v = (tensors[f"model.layers.1.self_attn.{one}_proj.weight"] for one in "qkv")
    heads = q.reshape(4, 2, 2, 8)  # head, query or gate, K, D
    groups = [
        np.concatenate(
            [heads[2 * group : 2 * group + 2, part].reshape(4, 8) for part in (0, 1)] + [k[rows], v[rows]]
        )
        for group in range(2)
        for rows in [slice(2 * group, 2 * group + 2)]
    ]
    assert np.array_equal(np.concatenate(shards), np.concatenate(groups))


def test_gate_and_up_are_stacked_on_each_rank() -> None:
    meta = model()
    tensors = numbered(meta)
    gate, up = (np.split(tensors[f"model.layers.0.mlp.{name}_proj.weight"], 2) for name in ("gate", "up"))
    for rank in range(2):
        shard = assemble(
            plans(meta, Layout(world=2, tp=2), rank)["0/decoder.layers.0.mlp.linear_fc1.weight"], tensors
        )
        assert np.array_equal(shard, np.concatenate([gate[rank], up[rank]]))


def test_columns_are_cut_for_row_parallel_linears() -> None:
    meta = model()
    tensors = numbered(meta)
    expected = np.split(tensors["model.layers.0.mlp.down_proj.weight"], 2, axis=1)
    for rank in range(2):
        shard = assemble(
            plans(meta, Layout(world=2, tp=2), rank)["0/decoder.layers.0.mlp.linear_fc2.weight"], tensors
        )
        assert np.array_equal(shard, expected[rank])


def test_vocabulary_padding_is_at_the_end() -> None:
    meta = model()
    tensors = numbered(meta)
    padded = np.concatenate([tensors["lm_head.weight"], np.full((1, 8), -1)])
    for rank, expected in enumerate(np.split(padded, 2)):
        shard = assemble(plans(meta, Layout(world=2, tp=2), rank)["0/output_layer.weight"], tensors)
        assert np.array_equal(shard, expected)


def test_heads_that_tp_does_not_divide_are_padded_on_both_sides_of_the_attention() -> None:
    meta = model(num_kv_heads=3, num_heads=9)
    tensors = numbered(meta)
    shards = [plans(meta, Layout(world=2, tp=2), rank) for rank in range(2)]
    qkv, proj = (
        [assemble(shard[f"0/decoder.layers.0.self_attention.{name}.weight"], tensors) for shard in shards]
        for name in ("linear_qkv", "linear_proj")
    )
    assert [shard.shape for shard in qkv] == [(20, 8), (20, 8)]  # 4 groups of 3 + 2 heads of 2, over 2 ranks
    assert (qkv[1][10:] == -1).all() and (qkv[1][:10] != -1).all() and (qkv[0] != -1).all()
    assert [shard.shape for shard in proj] == [(8, 12), (8, 12)]
    whole = np.concatenate(proj, axis=1)
    assert np.array_equal(whole[:, :18], tensors["model.layers.0.self_attn.o_proj.weight"])
    assert (whole[:, 18:] == -1).all()


def test_layers_of_interleaved_chunks_are_the_global_ones() -> None:
    meta = model()
    layout = Layout(world=2, pp=2, vpp=2)
    norm = "decoder.layers.0.input_layernorm.weight"
    found = {
        (rank, vp): plans(meta, layout, rank)[f"{vp}/{norm}"].pieces[0].tensor
        for rank in range(2)
        for vp in range(2)
    }
    assert {place: name.split(".")[2] for place, name in found.items()} == {
        (0, 0): "0",
        (1, 0): "1",
        (0, 1): "2",
        (1, 1): "3",
    }


def test_last_stage_of_a_tied_model_holds_a_copy_that_is_not_written() -> None:
    meta = MODELS["llama-tied"]
    assert "0/output_layer.weight" not in plans(meta, Layout(), 0)
    copy = plans(meta, Layout(world=2, pp=2), 1)["0/output_layer.weight"]
    assert copy.is_copy and copy.pieces[0].tensor == "model.embed_tokens.weight"
    assert "lm_head.weight" not in file_tensors(meta)


def test_experts_have_local_numbers_and_global_tensors() -> None:
    meta = MODELS["mixtral"]
    parameter = plans(meta, Layout(world=2, ep=2), 1)[
        "0/decoder.layers.2.mlp.experts.local_experts.1.linear_fc1.weight"
    ]
    assert [piece.tensor for piece in parameter.pieces] == [
        f"model.layers.2.block_sparse_moe.experts.3.{name}.weight" for name in ("w1", "w3")
    ]


def test_dense_layers_of_a_mixed_model_have_no_experts() -> None:
    names = file_tensors(MODELS["qwen2_moe"])
    assert "model.layers.0.mlp.gate_proj.weight" in names and "model.layers.0.mlp.gate.weight" not in names
    assert "model.layers.1.mlp.gate_proj.weight" not in names and "model.layers.1.mlp.gate.weight" in names


@pytest.mark.parametrize(
    ("meta", "layout", "message"),
    [
        (
            model(ffn_hidden_size=9),
            Layout(world=2, tp=2),
            "tp=2 does not cut mlp.linear_fc1.weight evenly: 2 does not divide 9",
        ),
        (MODELS["mixtral"], Layout(world=3, ep=3), "ep=3 does not divide num_experts=4"),
        (MODELS["mixtral"], Layout(world=4, etp=4), "etp=4 does not cut"),
        (MODELS["llama"], Layout(world=3, pp=3), "pp=3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(meta: ModelMeta, layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        certify(meta, layout)


@pytest.mark.parametrize(
    ("spelt", "local"),
    [
        (
            "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.3.input_layernorm.weight",
        ),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.3.mlp.experts.linear_fc2.weight12",
            "decoder.layers.3.mlp.experts.local_experts.12.linear_fc2.weight",
        ),
        ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_transformer_engine_names_are_understood(spelt: str, local: str) -> None:
    assert local_spelling(spelt) == local


def test_adapters_are_told_from_weights() -> None:
    assert is_adapter("decoder.layers.0.mlp.linear_fc1.lora_a.weight")
    assert not is_adapter("decoder.layers.0.mlp.linear_fc1.weight")


@pytest.mark.parametrize("other_head", ["scores", "untied"])  # a model has one head
@pytest.mark.parametrize("family", TABLES)
def test_rows_of_a_table_name_each_parameter_and_tensor_once(family: str, other_head: str) -> None:
    rows = [row for row in TABLES[family].rows if row.when != other_head]
    either_or = (Place.VALUES, Place.NO_VALUES, Place.NO_KEYS)  # a layer is one of them
    parameters = [(row.place if row.place in either_or else None, row.megatron) for row in rows]
    files = [(row.place, tensor) for row in rows for tensor in row.tensors]
    assert len(set(parameters)) == len(parameters) and len(set(files)) == len(files)


def test_stripes_are_runs_of_rows() -> None:
    stripe = Stripe(3, 4, 10, 2)
    assert stripe.intervals() == [(3, 5), (13, 15), (23, 25), (33, 35)]
    assert Stripe(0, 3, 2, 2).intervals() == [(0, 6)]
