"""Build this rank's part of the model."""

from dataclasses import replace

from megatron.core import parallel_state

from megaswift.config.head_rules import predicts_tokens
from megaswift.config.reference import distils
from megaswift.config.run import RunConfig
from megaswift.mcore.configs import transformer_config
from megaswift.mcore.patches import apply_patches
from megaswift.metadata.features import check_supported
from megaswift.metadata.meta import ModelMeta
from megaswift.models.activations import XIELU
from megaswift.models.causal_lm import CausalLM
from megaswift.models.fp8 import emulate_fp8
from megaswift.models.layer_inputs import Carried, PerLayerEmbedding
from megaswift.models.product import has_half_products, multiply_in_float32
from megaswift.models.replay import place_replay
from megaswift.models.rope import RotaryPositions
from megaswift.models.score import score_head
from megaswift.models.specs import decoder_spec, norm_of
from megaswift.parallel.layout import Layout, chunk_layers, padded_vocab_size
from megaswift.platforms.platform import Platform


def build_model(meta: ModelMeta, run: RunConfig, layout: Layout, platform: Platform) -> list[CausalLM]:
    """Return this rank's model chunks, one for each virtual pipeline stage, without weights unless --random_init.

    Megatron's process groups must stand. `run` is resolved. Raises ModelError for a family that is not built yet.
    """
    check_supported(meta)
    apply_patches()
    if run.tuner.quant_bits:
        # Their weights are of modules that multiply by torch, and are read into host memory: models/nf4.py.
        platform = replace(platform, transformer_engine=False)
    config = transformer_config(meta, run, layout, platform)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for vp_rank in range(layout.vpp):
        layers = chunk_layers(layout, meta.num_layers, pp_rank=pp_rank, vp_rank=vp_rank)
        vp_stage = vp_rank if layout.vpp > 1 else None
        carried = Carried()
        model = CausalLM(
            config=config,
            transformer_layer_spec=decoder_spec(
                meta, config, platform, layers=layers, vp_stage=vp_stage, carried=carried
            ),
            vocab_size=padded_vocab_size(meta.vocab_size, tp=layout.tp),
            max_sequence_length=meta.max_length,
            pre_process=pp_rank == 0 and vp_rank == 0,
            post_process=pp_rank == layout.pp - 1 and vp_rank == layout.vpp - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=meta.tied_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        if meta.scores is not None and model.post_process:
            model.output_layer = score_head(config, outputs=meta.scores, seed=run.training.seed)
        model.scores = meta.scores is not None
        model.notes_right = predicts_tokens(run)
        model.gives_states = distils(run) or run.model.task_type == "generative_reranker"
        model.logical_vocab_size = meta.vocab_size
        model.set_multipliers(meta.multipliers)
        model.carried = carried
        model.layer_inputs = None
        if meta.layer_inputs is not None:
            model.layer_inputs = PerLayerEmbedding(config, meta, norm=norm_of(meta), tp=layout.tp)
        if hasattr(model, "rotary_pos_emb"):  # latent attention has its own
            model.rotary_pos_emb = RotaryPositions(meta, platform.device)
        if meta.activation == "xielu":
            for layer in model.decoder.layers:
                layer.mlp.activation_func = XIELU(config)
        assert len(model.decoder.layers) == len(layers), (
            f"{len(model.decoder.layers)} layers built, {len(layers)} planned"
        )
        if meta.moe is not None and run.rollout.router_replay_mode != "disabled":
            model.replay = place_replay(model.decoder.layers, layers, meta.moe.layer_is_moe)
        if platform.name == "cpu" and not has_half_products(config.params_dtype):
            multiply_in_float32(model)
        if run.precision.fp8_format != "none" and platform.name == "cpu":
            emulate_fp8(model, run.precision, num_layers=meta.num_layers)
        chunks.append(model if run.tuner.quant_bits else model.to(platform.device))
    return chunks
