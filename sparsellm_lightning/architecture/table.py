"""Rows that override what discovery finds for a ``model_type`` of ``transformers``. Empty unless a user adds one."""

from __future__ import annotations

from dataclasses import dataclass

from sparsellm_lightning.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The layout of one ``model_type``. Fields that are None are discovered.

    Args:
        blocks: attribute path of the list of decoder blocks, from ``model.base_model``.
        up, down: attribute paths, inside a block, of the feed-forward projections: both or neither. Other layers are found.
        gate: likewise, where the block is gated.
        activation: name of the feed-forward activation in ``transformers``. Only with ``up`` and ``down``.

    Raises:
        UserError: ``up`` without ``down`` or the other way round, or ``gate`` or ``activation`` without both.
    """

    blocks: str | None = None
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("up", "down", "gate", "activation") if getattr(self, name) is not None]
        if given and not {"up", "down"} <= set(given):
            raise UserError(
                f"An Architecture names up and down together, or leaves the feed-forward network to discovery, got only "
                f"{', '.join(given)}. Give up and down too."
            )


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add or replace the row for ``config.model_type``."""
    ARCHITECTURES[model_type] = architecture
