"""Models of published runs: the dimensions of a row, and what its columns do not say."""

from megaswift.metadata.meta import MLAMeta, ModelMeta, MoEMeta

# Families whose feed-forward part has no gate: GPT-2's GELU, squared ReLU, and their reports' own descriptions.
UNGATED = ("GPT3", "GPT-", "Nemotron", "BLOOM", "mpt", "MPT", "Megatron", "MT-NLG", "ChatGLM-1")
GATED_DESPITE_NAME = ("GPT-OSS", "GPT_OSS")

# config.json of the models named: head_dim, dense intermediate_size, shared experts, first_k_dense_replace.
HEAD_DIM = {"Qwen3": 128, "GPT-OSS": 64, "GPT_OSS": 64, "Llama4": 128}
DENSE_FFN = {"DeepSeek-V2": 12288, "DeepSeek-V3": 18432, "Kimi-K2": 18432, "Llama4-Maverick": 16384}
SHARED_FFN = {
    "DeepSeek-V2": 3072,
    "DeepSeek-V3": 2048,
    "Kimi-K2": 2048,
    "Qwen2-57B-A14B": 20480,
    "Llama4": 8192,
    "Qwen3-Next": 512,
}
FIRST_DENSE = {"DeepSeek-V2": 1, "DeepSeek-V3": 3, "Kimi-K2": 1}
EVERY_SECOND = ("Llama4-Maverick",)  # interleave_moe_layer_step: 2
MLA = MLAMeta(q_rank=1536, kv_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128)
LATENT = ("DeepSeek-V2", "DeepSeek-V3", "Kimi-K2")
WINDOWS = {"GPT-OSS": 128, "GPT_OSS": 128}  # of every second layer
UNPUBLISHED_VOCAB = 51200  # GPT-2's, padded


def meta_of(row: dict[str, str]) -> ModelMeta:
    """Return the model of a row."""
    model = row["model"].replace("_", "-") if row["model"].startswith("GPT_OSS") else row["model"]
    heads, hidden, layers = int(row["heads"]), int(row["hidden"]), int(row["layers"])
    ffn = int(float(row["ffn"])) if row["ffn"] else 4 * hidden
    experts = int(float(row["experts"])) if row["experts"] else 0
    gated = model.startswith(GATED_DESPITE_NAME) or not model.startswith(UNGATED)
    window = _of(WINDOWS, model, None)
    return ModelMeta(
        model_type="published",
        architecture="published",
        family="published",
        folder=None,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_of(DENSE_FFN, model, ffn) if experts else ffn,
        num_heads=heads,
        num_kv_heads=int(float(row["kv_heads"])) if row["kv_heads"] else heads,
        head_dim=_of(HEAD_DIM, model, hidden // heads),
        vocab_size=int(float(row["vocab"])) if row["vocab"] else UNPUBLISHED_VOCAB,
        max_length=int(row["seq_len"]),
        gated_mlp=gated,
        qk_norm="head" if model.startswith("Qwen3") else None,
        mla=MLA if model.startswith(LATENT) else None,
        moe=_moe(row, model, experts, ffn, layers) if experts else None,
        sliding_window=tuple(None if layer % 2 else window for layer in range(layers)) if window else (),
    )


def mtp_layers_of(row: dict[str, str]) -> int:
    """Return the multi-token-prediction layers that a run trains: Megatron-Bridge's recipe of DeepSeek-V3 has one."""
    return int(row["model"].startswith("DeepSeek-V3") and row["source"].startswith("Megatron-Bridge"))


def _moe(row: dict[str, str], model: str, experts: int, ffn: int, layers: int) -> MoEMeta:
    dense = _of(FIRST_DENSE, model, 0)
    every_second = model.startswith(EVERY_SECOND)
    return MoEMeta(
        num_experts=experts,
        topk=int(float(row["topk"])) if row["topk"] else 2,
        ffn_hidden_size=ffn,
        layer_is_moe=tuple(
            layer >= dense and (layer % 2 == 1 or not every_second) for layer in range(layers)
        ),
        shared_ffn_hidden_size=_of(SHARED_FFN, model, 0),
    )


def _of(table: dict[str, int], model: str, default: int | None) -> int:
    """Return the entry of the longest name that `model` begins with."""
    names = [name for name in table if model.startswith(name)]
    return table[max(names, key=len)] if names else default  # type: ignore[return-value] # None only for WINDOWS
