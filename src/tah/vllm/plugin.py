"""Entry point of vLLM (`vllm.general_plugins`), which registers TaH checkpoints in each of its processes."""

from __future__ import annotations

from typing import Any

from .names import ARCHITECTURE


def register() -> None:
    """Register the model and the check of its configuration; cheap for processes that serve other models."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    import tah  # noqa: F401  # registers TaHConfig with transformers

    class TaHServing(VerifyAndUpdateConfig):
        """Check of the configuration, which vLLM calls after it reads its flags and before it selects a worker."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """Check and complete vLLM's configuration."""
            from .settings import settle

            settle(vllm_config)

    ModelRegistry.register_model(ARCHITECTURE, "tah.vllm.model:TaHForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = TaHServing
