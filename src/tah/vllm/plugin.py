"""Entry point of vLLM's plugins (`vllm.general_plugins`): registers TaH checkpoints in each of its processes."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "TaHForCausalLM"


def register() -> None:
    """Register the model and what its configuration needs; cheap for processes that serve other models."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    import tah  # noqa: F401  # registers our configuration with transformers

    class TaHServing(VerifyAndUpdateConfig):
        """vLLM calls this once it has read its flags, and before it picks a worker."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from .settings import settle

            settle(vllm_config)

    ModelRegistry.register_model(ARCHITECTURE, "tah.vllm.model:TaHForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = TaHServing
