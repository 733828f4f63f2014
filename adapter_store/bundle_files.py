"""What an adapter's two files are called; alone, for the inspection's process starts with it and with little else."""

from typing import Final

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
BUNDLE_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)
