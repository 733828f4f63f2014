"""Methods added to vLLM's worker (`--worker-extension-cls`): they run beside the model, in the engine process."""

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker class, which supplies `model_runner`."""

    model_runner: Any

    def tailor_residency(self) -> tuple[list[int], list[int]]:
        """Adapter ids on the device and in host memory (vLLM 0.32: lora/model_manager.py)."""
        manager = self.model_runner.lora_manager._adapter_manager
        return list(manager._active_adapters.cache), list(manager._registered_adapters.cache)
