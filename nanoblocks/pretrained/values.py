"""One checker for the values of config.json: their types, before anything is computed from them."""
import math

COUNTS = {
    'adapter_rank', 'attention_chunk_size', 'attention_head_dim', 'attention_hidden_size',
    'attn_layer_offset', 'attn_layer_period', 'block_ff_dim', 'block_multiple_of', 'context_length',
    'conv_L_cache', 'conv_kernel', 'd_ff', 'd_kv', 'd_model', 'decoder_attention_heads',
    'decoder_ffn_dim', 'decoder_layers', 'decoder_sparse_step', 'decoder_start_token_id', 'dim',
    'dim_model_base', 'embedding_dim', 'embedding_size', 'encoder_attention_heads', 'encoder_ffn_dim',
    'encoder_layers', 'expert_layer_offset', 'expert_layer_period', 'experts_per_token', 'ffn_dim',
    'ffn_hidden_size', 'ffn_round_up_to_multiple_of', 'first_k_dense_replace', 'full_attention_interval',
    'global_attn_every_n_layers', 'head_dim', 'hidden_dim', 'hidden_size', 'interleave_moe_layer_step',
    'intermediate_size', 'intermediate_size_mlp', 'kv_lora_rank', 'kv_n_heads', 'layer_group_size',
    'linear_conv_kernel_dim', 'linear_head_dim', 'linear_key_head_dim', 'linear_num_heads',
    'linear_num_key_heads', 'linear_num_value_heads', 'linear_value_head_dim', 'local_attention',
    'mamba_d_conv', 'mamba_d_ssm', 'mamba_d_state', 'mamba_head_dim', 'mamba_headdim', 'mamba_n_groups',
    'mamba_n_heads', 'mamba_ngroups', 'mamba_num_heads', 'max_position_embeddings', 'max_seq_len',
    'max_window_layers', 'model_max_length', 'moe_intermediate_size', 'moe_k', 'moe_layer_interval',
    'moe_layer_start_index', 'moe_num_experts', 'moe_num_shared_experts',
    'moe_shared_expert_intermediate_size', 'n_ctx', 'n_embd', 'n_embed', 'n_group', 'n_groups', 'n_head',
    'n_heads', 'n_inner', 'n_layer', 'n_layers', 'n_mamba_heads', 'n_positions', 'n_routed_experts',
    'n_shared_experts', 'no_rope_layer_interval', 'num_attention_heads', 'num_blocks',
    'num_decoder_layers', 'num_dense_layers', 'num_expert_group', 'num_experts', 'num_experts_per_tok',
    'num_experts_per_token', 'num_heads', 'num_hidden_layers', 'num_key_value_heads', 'num_kv_heads',
    'num_layers', 'num_ln_in_parallel_attn', 'num_local_experts', 'num_mem_blocks', 'num_mtp_layers',
    'num_nextn_predict_layers', 'num_shared_experts', 'original_max_position_embeddings',
    'pad_vocab_size_multiple', 'q_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim',
    'relative_attention_max_distance', 'relative_attention_num_buckets', 'rotary_dim',
    'shared_expert_intermediate_size', 'shared_intermediate_size', 'short_conv_kernel_size',
    'sliding_window', '_sliding_window_pattern', 'ssm_state_size', 'state_size', 'topk_group',
    'type_vocab_size', 'v_head_dim', 'vocab_size', 'window_size', 'word_embed_proj_dim'}
NUMBERS = {
    'alibi_bias_max', 'attention_factor', 'attention_in_multiplier', 'attention_multiplier',
    'attention_out_multiplier', 'attn_logit_softcapping', 'attn_scale', 'beta_fast', 'beta_slow',
    'block_ffn_dim_multiplier', 'clip_qkv', 'embedding_multiplier', 'eps', 'expand', 'factor',
    'ffn_proj_factor', 'final_logit_softcapping', 'floor_scale', 'full_attn_alpha_factor',
    'full_attn_beta_factor', 'gate_soft_cap', 'global_rope_theta', 'high_freq_factor', 'kda_lower_bound',
    'key_multiplier', 'layer_norm_eps', 'layer_norm_epsilon', 'linear_attn_alpha_factor',
    'linear_attn_beta_factor', 'lm_head_multiplier', 'local_rope_theta', 'logits_scaling',
    'low_freq_factor', 'mamba_expand', 'mixer_rms_eps', 'mlp_alpha_factor', 'mlp_beta_factor',
    'moe_layer_end_index', 'moe_norm_min', 'mscale', 'mscale_all_dim', 'norm_eps', 'norm_epsilon',
    'output_logit_soft_cap', 'partial_rotary_factor', 'qk_dim_factor', 'query_pre_attn_scalar',
    'residual_multiplier', 'rms_norm_eps', 'rope_local_base_freq', 'rope_theta', 'rotary_emb_base',
    'rotary_pct', 'routed_scaling_factor', 'scale_depth', 'scale_emb', 'softmax_scale',
    'ssm_in_multiplier', 'ssm_out_multiplier', 'swiglu_alpha', 'swiglu_limit', 'time_step_min',
    'v_dim_factor'}
TRUTHS = {
    'add_bias_linear', 'add_cross_attention', 'add_final_layer_norm', 'add_out_norm', 'alibi',
    'apply_residual_connection_post_layernorm', 'attention_bias', 'attention_out_bias', 'bias',
    'block_auto_adjust_ff_dim', 'classifier_bias', 'conv_bias', 'decoder_bias', 'do_layer_norm_before',
    'enable_bias', 'is_causal', 'is_decoder', 'is_encoder_decoder', 'kda_safe_gate',
    'layer_norm_elementwise_affine',
    'linear_allow_neg_eigval', 'mamba_conv_bias', 'mamba_norm_before_gate', 'mamba_proj_bias',
    'mamba_rms_norm', 'mlp_bias', 'moe_renormalize', 'multi_query', 'new_decoder_architecture',
    'norm_bias', 'norm_topk_prob', 'normalize_before', 'parallel_attn', 'prefix_lm', 'projectors_bias',
    'qk_layernorm', 'qk_ln', 'qkv_bias', '_remove_final_layer_norm', 'rope_interleave',
    'scale_attn_by_inverse_layer_idx', 'scale_attn_weights', 'scale_decoder_outputs', 'scale_embedding',
    'slow_but_exact', 'tie_embedding', 'tie_embeddings', 'tie_word_embeddings', 'truncate', 'use_bias',
    'use_conv_bias', 'use_expert_bias', 'use_long_context', 'use_mem_rope', 'use_parallel_residual',
    'use_qk_norm', 'use_qkv_bias', 'use_shared_attention_adapter', 'use_sliding_window'}
WORDS = {
    'activation', 'activation_function', 'classifier_activation', 'feed_forward_proj', 'hidden_act',
    'hidden_activation', 'hybrid_override_pattern', 'mamba_hidden_act', 'mlp_hidden_act', 'model_type',
    'position_embedding_type', 'rope_type', 'topk_method', 'type', 'weight_mode'}
LISTS_OF_NUMBERS = {'attn_layer_indices', 'full_attn_idxs', 'full_attn_layers', 'kda_layers', 'long_factor',
                    'mlp_multipliers', 'mlp_only_layers', 'moe_layers', 'no_rope_layers', 'short_factor',
                    'ssm_multipliers'}
LISTS_OF_WORDS = {'layer_types', 'layers_block_type', 'mlp_layer_types'}
# their values are checked too
TABLES = {'attn_config', 'linear_attn_config', 'rope_parameters', 'rope_scaling'}

MOST = 2 ** 31 - 1  # of what is counted


def is_count(value):
    return type(value) is int and 0 <= value <= MOST


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300 and not math.isnan(value)


RULES = (
    (COUNTS, is_count, f'be a whole number from 0 to {MOST}'),
    (NUMBERS, is_number, 'be a finite number'),
    (TRUTHS, lambda value: type(value) is bool, 'be true or false'),
    (WORDS, lambda value: type(value) is str, 'be a string'),
    ({'sliding_window_pattern'}, lambda value: is_count(value) or type(value) is str,
     'be a whole number or letters'),
    (LISTS_OF_NUMBERS, lambda value: type(value) is list and all(map(is_number, value)),
     'be a list of numbers'),
    (LISTS_OF_WORDS, lambda value: type(value) is list and all(type(x) is str for x in value),
     'be a list of strings'),
    (TABLES, lambda value: type(value) is dict, 'hold names and values'))


def check_values(table, path):
    """ValueError for a key whose value has another type than it must have, or no finite size."""
    for key, value in table.items():
        for names, holds, rule in RULES:
            if key in names and value is not None and not holds(value):
                raise ValueError(f'{key}={shown(value)} in {path} must {rule}: correct it or fetch the file '
                                 'again')
        if isinstance(value, dict) and (key in TABLES or key in ('full_attention', 'sliding_attention')):
            check_values(value, path)


def shown(value):
    text = repr(value)
    return text if len(text) <= 40 else f'{text[:37]}...'
