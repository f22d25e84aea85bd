"""What vLLM is asked for and cannot do with compressed checkpoints, said before any work."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..zoo.models.config import Config
from .native import native_config


class Checks(VerifyAndUpdateConfig):
    """vLLM calls this as soon as it has read all options."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise ValueError for an option that is not supported."""
        config = native_config(vllm_config.model_config.hf_config)
        for given, advice in _refused(vllm_config, config):
            raise ValueError(f"a compressed cache is not served with {given}: {advice}")


def _refused(options: Any, config: Config) -> Any:
    """What is not supported, and what to do instead."""
    parallel, model, cache = options.parallel_config, options.model_config, options.cache_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"{name} {getattr(parallel, name)}", "use one device, or several servers"
    if options.lora_config is not None:
        yield "LoRA", "merge the adapter into the model, then compress it"
    if model.quantization is not None:
        yield f"quantization {model.quantization!r} of weights", "omit it"
    if cache.cache_dtype != "auto":
        yield f"kv_cache_dtype {cache.cache_dtype!r}", "omit it; config.json says how many bits"
    steady = config.steady_length  # pages keep the angles of the length at which they were written
    if steady is not None and model.max_model_len > steady:
        what = f"RoPE whose angles change after {steady} tokens, and {model.max_model_len} tokens"
        yield what, f"pass --max-model-len {steady}"
