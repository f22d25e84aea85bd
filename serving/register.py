"""vLLM's plugin: it serves compressed checkpoints without running code that comes with them.

vLLM finds `register` by its entry point and calls it in each of its processes.
"""

OLDEST, NEWEST = (0, 32), (0, 32)  # versions of vLLM that were tried; pyproject.toml names them too
NAME = "EigenForCausalLM"  # as config.json of a checkpoint calls its model


def register() -> None:
    """Tell vLLM the config and the model of compressed checkpoints.

    Raises ValueError for a version of vLLM that has not been tried.
    """
    from vllm.version import __version__ as version

    if not OLDEST <= _numbers(version) <= NEWEST:
        low, high = (".".join(map(str, x)) for x in (OLDEST, NEWEST))
        raise ValueError(
            f"eigenzoo serves with vLLM {low} to {high}, given {version}: install one of these, or "
            "set VLLM_PLUGINS= to use this vLLM without eigenzoo"
        )
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..hub_export.remote.configuration_eigen import EigenConfig
    from .checks import Checks

    AutoConfig.register(EigenConfig.model_type, EigenConfig, exist_ok=True)
    ModelRegistry.register_model(NAME, "eigenzoo.serving.model:EigenForCausalLM")
    MODELS_CONFIG_MAP[NAME] = Checks


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor version. A build from source is "dev", which is taken for the newest."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if all(x.isdigit() for x in parts) else NEWEST
