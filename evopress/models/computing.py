"""Settings of a config that say how a model is computed, or what a call returns, and nothing of what the model is.

Published configs name attention kernels that few machines have (`flash_attention_2`), or ask for tuples in place of
named outputs. Every machine chooses these for itself, so they are neither obeyed nor handed on.
"""

from typing import Any

HOW_TO_COMPUTE = frozenset(
    {
        # which kernels
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("_attn_implementation_autoset", "experts_implementation", "_experts_implementation"),
        *("_experts_implementation_internal", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention"),
        *("use_flash_attention_2", "flash_attn", "flash_rotary", "use_flash_rotary", "fused_dense", "use_sdpa"),
        *("use_kernels", "use_mamba_kernels", "compile_config", "cache_implementation"),
        # where
        *("device_map", "tp_plan", "base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"),
        *("distributed_config", "low_cpu_mem_usage"),
        # in training
        *("gradient_checkpointing", "use_gradient_checkpointing"),
        # what a call returns
        *("torchscript", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
    }
)


def computed_as_here(config: Any) -> Any:
    """A transformers config, changed so that this machine chooses how to compute it; its text model's likewise."""
    for section in (config, config.get_text_config()):
        section.output_attentions = section.output_hidden_states = False
        section.return_dict = True
    config._attn_implementation = config._experts_implementation = None  # these reach all sections
    return config
