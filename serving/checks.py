"""What vLLM is asked for and cannot do with compressed checkpoints, said before any work."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ..zoo.models.config import Config
from . import moved
from .native import native_config
from .parallel import Share, new_part


class Checks(VerifyAndUpdateConfig):
    """vLLM calls this as soon as it has read all options."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise ValueError for an option that is not supported."""
        config = native_config(vllm_config.model_config.hf_config)
        for given, advice in _refused(vllm_config, config):
            raise ValueError(f"a compressed cache is not served with {given}: {advice}")
        transfer = vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == moved.NAME:
            moved.check(config, vllm_config)


def _refused(options: Any, config: Config) -> Any:
    """What is not supported, and what to do instead."""
    parallel, model, cache = options.parallel_config, options.model_config, options.cache_config
    if parallel.tensor_parallel_size > 1:
        share = Share(config, 0, parallel.tensor_parallel_size)
        try:
            new_part(share)
        except ValueError as error:
            yield f"tensor_parallel_size {share.parts}", str(error)
    stages, layers = parallel.pipeline_parallel_size, config.num_hidden_layers
    if stages > layers:
        yield f"pipeline_parallel_size {stages}", f"pass at most {layers}, one for each layer"
    if stages > 1 and model.enforce_eager and current_platform.is_cpu():  # vLLM fails at a request
        yield f"pipeline_parallel_size {stages} and --enforce-eager on a CPU", "omit one of them"
    if (count := parallel.decode_context_parallel_size) > 1:
        yield f"decode_context_parallel_size {count}", "omit it"
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
