"""Importing this registers the classes: compressed folders load without trust_remote_code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .remote.configuration_eigen import EigenConfig
from .remote.modeling_eigen import EigenForCausalLM, EigenModel

AutoConfig.register(EigenConfig.model_type, EigenConfig, exist_ok=True)
AutoModel.register(EigenConfig, EigenModel, exist_ok=True)
AutoModelForCausalLM.register(EigenConfig, EigenForCausalLM, exist_ok=True)
