"""Refusing NaN and infinity before they reach a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from sparsellm_lightning.calibration.context import Context
from sparsellm_lightning.distributed import local_tensor
from sparsellm_lightning.solvers import NumericalError, all_finite


def check_finite_weights(context: Context, parameters: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity in parameters. All ranks call this together.

    Raises:
        NumericalError: names the first such parameter, on the ranks that hold it.
    """
    wrong = [name for name, parameter in parameters.items() if not all_finite(local_tensor(parameter))]
    if not context.ranks.all(not wrong):
        found = f"{wrong[0]} holds" if wrong else "a weight on another rank holds"
        raise NumericalError(f"Weights must be finite, but {found} NaN or infinity. Load a model without them.")


def check_finite_activations(context: Context, activations: Iterable[Tensor], where: str) -> None:
    """Refuse NaN and infinity in activations of fitted or held-out tokens. All ranks call this together.

    Args:
        context: of the run.
        activations: tensors of valid tokens.
        where: for the message, such as ``in front of model.layers.3``.

    Raises:
        NumericalError: on every rank.
    """
    if not context.ranks.all(all(map(all_finite, activations))):
        raise NumericalError(
            f"Activations must be finite, but the hidden states {where} hold NaN or infinity on the calibration tokens. Check "
            "the calibration text and the dense model, or run in bf16 or float32 rather than float16."
        )
