"""`import eigenzoo.hub_export.register`: compressed folders load without trust_remote_code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .remote.configuration_eigen_llama import EigenLlamaConfig
from .remote.modeling_eigen_llama import EigenLlamaForCausalLM, EigenLlamaModel

AutoConfig.register(EigenLlamaConfig.model_type, EigenLlamaConfig, exist_ok=True)
AutoModel.register(EigenLlamaConfig, EigenLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(EigenLlamaConfig, EigenLlamaForCausalLM, exist_ok=True)
