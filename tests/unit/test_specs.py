"""What Transformer Engine's layers do not have is refused by name."""

from dataclasses import replace

import pytest

from megaswift.errors import ModelError
from megaswift.metadata.features import BUILT, FEATURES
from megaswift.metadata.meta import AttentionMeta, ModelMeta, NormMeta
from megaswift.models.specs import LOCAL_ONLY, check_transformer_engine

LLAMA = ModelMeta(
    model_type="llama",
    architecture="LlamaForCausalLM",
    family="llama",
    folder=None,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=131,
    max_length=512,
)


def test_local_features_are_built_features() -> None:
    assert set(LOCAL_ONLY) <= BUILT <= set(FEATURES)


def test_transformer_engine_takes_what_its_layers_have() -> None:
    check_transformer_engine(LLAMA)
    check_transformer_engine(replace(LLAMA, qk_norm="head", qkv_bias=True, norm=NormMeta(zero_centered=True)))


@pytest.mark.parametrize(
    ("meta", "missing"),
    [
        (replace(LLAMA, norm=NormMeta(placement="sandwich")), "norms before and after each branch"),
        (replace(LLAMA, norm=NormMeta(kind="layernorm")), "layer norm without a bias"),
        (replace(LLAMA, qk_norm="full"), "norms of q and k over all heads"),
        (replace(LLAMA, attention=AttentionMeta(softcap=50.0)), "soft-capped scores"),
        (replace(LLAMA, mlp_bias=True), "branches that differ in biases"),
    ],
)
def test_transformer_engine_refuses_local_features_by_name(meta: ModelMeta, missing: str) -> None:
    with pytest.raises(ModelError, match=missing):
        check_transformer_engine(meta)
