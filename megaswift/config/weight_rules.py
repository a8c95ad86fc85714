"""Rules of runs whose weights are those of a Megatron-Core checkpoint."""

from megaswift.config.case import Case
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError


def weights_have_one_source(run: RunConfig) -> None:
    """A checkpoint is read, or nothing is."""
    if run.model.random_init and run.model.mcore_model is not None:
        raise ConfigError(
            f"random_init=true starts from random weights, and mcore_model={run.model.mcore_model} has others. Leave one of them out."
        )


def new_tokens_have_rows_everywhere(run: RunConfig) -> None:
    """Weights that other programs hold, or that lie in another layout, keep their rows."""
    model, sampler = run.model, run.sampler
    if not model.new_special_tokens:
        return
    others = {
        f"mcore_model={model.mcore_model}": model.mcore_model is not None,
        "vllm_mode=server": sampler.use_vllm and sampler.vllm_mode == "server",
    }
    for other, holds in others.items():
        if holds:
            raise ConfigError(
                f"new_special_tokens does not reach the weights of {other}. Make a folder that has them, `megaswift export --model M "
                "--new_special_tokens ... --output_dir FOLDER`, and go on from that."
            )


def adapters_name_a_base_without_these_weights(case: Case) -> Case | None:
    """PEFT reads no Megatron-Core checkpoint."""
    tuner, checkpoint = case.run.tuner, case.run.model.mcore_model
    if checkpoint is None or tuner.tuner_type != "lora" or tuner.merge_lora:
        return None
    return case.change(
        "tuner",
        f"mcore_model={checkpoint}: adapters belong to its weights, and name --model as their base. To use them, `megaswift convert "
        "--to hf` makes a folder of these weights; --merge_lora true exports the whole model, too.",
    )


def layers_that_go_through_are_in_the_folder(case: Case) -> Case | None:
    """Weights of multi-token prediction, which do not train, are those of the model's folder, too."""
    meta = case.meta
    if case.run.model.mcore_model is None or not meta.num_mtp_layers or meta.folder is None:
        return None
    if any(meta.folder.glob("*.safetensors")):
        return None
    return case.change(
        "model",
        f"{meta.folder} has no weights of multi-token prediction, and exports will have none. Give --model with a folder that has "
        "them to keep them.",
    )
