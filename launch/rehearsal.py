"""A rehearsal: the exact layout of a run, with a model that has the same parts but is small enough for processors."""

from dataclasses import replace
from typing import Any

from megaswift.config.run import RunConfig
from megaswift.parallel.layout import Layout

STEPS = 2  # the second one starts from updated weights
ROWS = 64  # of each data set
SMALL_RANK = 8  # of adapters that start from a decomposition
RANK_GIB = (
    1.0  # torch and Megatron-Core take 0.5 GiB of a rank, a shrunken model with its vocabulary the rest
)
HEAD, RANK, FEED_FORWARD = (
    8,
    32,
    32,
)  # sizes that every axis up to 16 can share out after multiplication below

# key of config.json -> its value in the small model; families use some of them
SMALL: dict[str, int] = {
    "head_dim": 2 * HEAD,
    "global_head_dim": 2 * HEAD,
    "q_lora_rank": RANK,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": 2 * HEAD,
    "qk_rope_head_dim": HEAD,
    "v_head_dim": 2 * HEAD,
    "linear_key_head_dim": 2 * HEAD,
    "linear_value_head_dim": 2 * HEAD,
}
SHARED_OUT = (
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
DROPPED = ("quantization_config", "auto_map", "num_nextn_predict_layers")


def shrink(config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Return a config.json of the same family with narrow, few layers; heads, experts and vocabulary stay."""
    if "text_config" in config:
        return {**config, "text_config": shrink(config["text_config"], layout)}
    small = {name: value for name, value in config.items() if name not in DROPPED}
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    few = layers if layout.pp_first is not None else _few_layers(config, layout)
    small.update({name: value for name, value in SMALL.items() if config.get(name)})
    small["hidden_size"] = heads * HEAD if "head_dim" not in config else max(heads * HEAD, 2 * HEAD)
    small.update({name: FEED_FORWARD * layout.tp * layout.etp for name in SHARED_OUT if config.get(name)})
    small["num_hidden_layers"] = few
    for name, value in config.items():
        if isinstance(value, list) and len(value) == layers:  # one entry a layer
            small[name] = value[:few]
    if "max_window_layers" in config:
        small["max_window_layers"] = min(few, config["max_window_layers"])
    if config.get("num_kv_shared_layers"):  # as many first layers have keys of their own as in the model
        small["num_kv_shared_layers"] = max(0, few - (layers - config["num_kv_shared_layers"]))
    small.update(dtype="float32", torch_dtype="float32")
    return small


def _few_layers(config: dict[str, Any], layout: Layout) -> int:
    """Return the fewest layers with at least one of each kind that give every stage and chunk the same number."""
    chunks = layout.pp * layout.vpp
    kinds = [
        1 + (config.get("first_k_dense_replace") or 0),
        config.get("full_attention_interval") or 1,
        config.get("interleave_moe_layer_step") or 1,
        2 if config.get("layer_types") else 1,
    ]
    return min(config["num_hidden_layers"], -(-max(kinds) // chunks) * chunks)


def rehearsal_of(run: RunConfig, layout: Layout, *, model: str, output_dir: str) -> RunConfig:
    """Return a resolved run as it is rehearsed: on processors, a few steps with few rows, saved once at the end.

    What is chosen of the model is so small that a small model has it: one drawn layer, drawn anew at every step, and a rank.
    """
    data, training, preference, tuner = run.data, run.training, run.preference, run.tuner
    if tuner.starts_from_weights or tuner.starts_from_gradients:
        tuner = replace(tuner, lora_rank=min(tuner.lora_rank, SMALL_RANK))
    if preference.mcore_ref_model is not None:
        preference = replace(preference, ref_model=model, mcore_ref_model=None)
    return replace(
        run,
        model=replace(
            run.model,
            model=model,
            model_revision=None,
            mcore_model=None,
            torch_dtype="float32",
            random_init=False,
        ),
        preference=preference,
        tuner=tuner,
        lisa=replace(
            run.lisa, lisa_activated_layers=min(1, run.lisa.lisa_activated_layers), lisa_step_interval=1
        ),
        data=replace(
            data,
            dataset=_few(data.dataset),
            val_dataset=_few(data.val_dataset),
            split_dataset_ratio=max(data.split_dataset_ratio, 1 / ROWS) if data.split_dataset_ratio else 0.0,
            streaming=False,  # the few rows are read at once
        ),
        training=replace(
            training,
            train_iters=STEPS,
            num_train_epochs=None,
            gradient_accumulation_steps=None,
            global_batch_size=training.micro_batch_size * layout.dp * max(2, layout.pp),
            gradient_accumulation_fusion=None,
        ),
        checkpoint=replace(run.checkpoint, output_dir=output_dir, save_strategy="no", resume="never"),
        launch=replace(run.launch, platform="cpu", nproc_per_node=layout.world),
    )


def _few(entries: list[str]) -> list[str]:
    return [entry if entry.rpartition("#")[2].isdigit() else f"{entry}#{ROWS}" for entry in entries]
