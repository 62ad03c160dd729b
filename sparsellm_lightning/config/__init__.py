"""What to prune and how: the only list of settings, and the presets. They are checked before a model is loaded."""

from sparsellm_lightning.config.presets import PRESETS, Allocation, Method, preset_settings
from sparsellm_lightning.config.settings import PruningConfig

__all__ = ["PRESETS", "Allocation", "Method", "PruningConfig", "preset_settings"]
