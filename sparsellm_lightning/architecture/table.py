"""Rows that override what discovery finds for a ``model_type`` of ``transformers``. Empty unless a user adds one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The layout of one ``model_type``. What is None is found.

    Args:
        blocks: attribute path of the list of decoder blocks, from ``model.base_model``.
        up, down: attribute paths, inside a block, of the feed-forward projections. The other linear layers are found.
        gate: likewise, where the block is gated.
        activation: name of the feed-forward activation in ``transformers``.
    """

    blocks: str | None = None
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    activation: str | None = None


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add or replace the row for ``config.model_type``."""
    ARCHITECTURES[model_type] = architecture
