"""Keys of config.json that do not change what a causal language model computes.

Source: PreTrainedConfig and GenerationConfig of transformers 5.23, and the keys that 4.x wrote beside them.
"""

_BOOKKEEPING = """
    _name_or_path name_or_path _commit_hash model_type architectures transformers_version torch_dtype dtype auto_map
    custom_pipelines id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class
    prefix bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id is_decoder use_bfloat16 tf_legacy_loss torchscript initializer_range use_cache return_dict
    use_return_dict output_attentions output_hidden_states gradient_checkpointing tie_encoder_decoder
    tie_last_hidden_states
    _attn_implementation _attn_implementation_autoset attn_implementation _experts_implementation use_flash_attn
    _flash_attn_2_enabled unsloth_fixed unsloth_version quantization_config
"""

_GENERATION = """
    cache_implementation assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores output_router_logits remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
"""

HARMLESS_KEYS = frozenset(_BOOKKEEPING.split() + _GENERATION.split())

# Harmless at these values only: another value would change the mathematics.
HARMLESS_VALUES: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_dropout": (0.0,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "embd_pdrop": (0.0, None),
    "embedding_dropout": (0.0, None),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pretraining_tp": (1, None),  # other values changed the order of summation, before transformers 4.45
    "pruned_heads": ({},),
    "router_jitter_noise": (0.0,),
    "use_sliding_window": (False,),
}
