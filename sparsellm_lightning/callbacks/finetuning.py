"""Fine-tuning a sparse model inside a Trainer, with every zero kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparsellm_lightning.architecture import Projection, patched
from sparsellm_lightning.distributed import adapter_for, local_tensor
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.sparsity import (
    SPARSE,
    Masks,
    has_adapters,
    linear_layers,
    mask_adapters,
    mask_adapters_by_zeros,
    sparse_layers,
    zero_shares,
)

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


class SparseFinetuning(pl.Callback):
    """Keep the zeros of a sparse model, however it was pruned, while it is trained.

    - After every backward pass, gradients of pruned weights are set to zero. This is before clipping, so they do not count in
      the norm. An optimizer's moments at pruned weights stay zero.
    - Directly after every optimizer step, pruned weights are set to zero, before any other callback sees them. Only optimizers
      that mix entries move them at all.
    - At the end of every epoch and of training, the zeros are compared with the masks, entry by entry.
    - LoRA adapters (``peft``) on sparse layers are masked in training and evaluation as in the merge.

    Works on one device, under DDP, FSDP2 and FSDP1 (which hides fused experts: they are refused), with any optimizer,
    precision, accumulation and compiled modules. The masks are of the local shard, one bit a weight. A resumed run rebuilds
    them from the zeros. The order among other callbacks does not matter.

    Raises:
        UserError: at setup, if the Trainer has Lightning's ``ModelPruning`` or an unsupported strategy; at the start of
            training, if no linear layer has 1 % of zeros, or if the zeros differ from those in the checkpoint.
        MaskError: at the end of an epoch or of training, if something else changed the zeros.
    """

    def __init__(self) -> None:
        self._masks: Masks | None = None  # while training
        self._zeros: dict[str, int] = {}  # their number, by layer
        self._stored: dict[str, Any] = {}
        self._hooks = ExitStack()
        self._random_state: torch.Tensor | None = None
        self._random_state_of_device: torch.Tensor | None = None
        self._resumes = True  # whether a state that is loaded is of the run that goes on
        self.checks = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.checks = 0
        self._masks, self._zeros, self._stored = None, {}, {}
        self._random_state = self._random_state_of_device = None
        adapter_for(trainer)
        if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"{type(self).__name__} keeps the masks itself, but the Trainer also has Lightning's ModelPruning, which would "
                "prune and reparametrise the same weights. Remove one of them."
            )
        averaging = [c for c in trainer.callbacks if isinstance(c, AVERAGING)]  # type: ignore[attr-defined]
        if not any(True for _ in pl_module.parameters()):
            if any(isinstance(callback, StochasticWeightAveraging) for callback in averaging):
                raise UserError(
                    "StochasticWeightAveraging copies the module before configure_model() builds it, so that it would average "
                    f"no weight of {type(pl_module).__name__}. Use Lightning's WeightAveraging or EMAWeightAveraging."
                )
            if averaging and not is_overridden("configure_model", pl_module):
                raise UserError(
                    f"{type(averaging[0]).__name__} copies the module before setup() builds it, so that it would average no "
                    f"weight of {type(pl_module).__name__}. Build the model in configure_model() or in __init__()."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a run: spawned workers of a DataLoader may get the Trainer, pickled."""
        return vars(self) | {"_hooks": ExitStack(), "_masks": None}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hold(trainer, pl_module, kept_layers(trainer, pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Training has masked them, or has not pruned yet.
        if trainer.state.fn != TrainerFn.FITTING and has_adapters(pl_module):
            mask_adapters_by_zeros(pl_module, adapter_for(trainer))

    on_test_start = on_predict_start = on_validation_start

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule, projections: list[Projection]) -> None:
        """Keep the zeros of these layers from now on."""
        self.release()
        adapter_for(trainer).check_visible()
        self._masks = Masks(projections, adapter_for(trainer))
        self._zeros = self._masks.zeros
        self._compare_with_stored()
        self._masks.clear_moments(trainer.optimizers)
        mask_adapters(pl_module, {p.module for p in projections})
        for optimizer in trainer.optimizers:
            # Not in on_train_batch_end, because a weight-averaging callback earlier in the list must see the zeros.
            self._hooks.enter_context(_after_steps(optimizer, self._apply))

    def release(self) -> None:
        """Stop keeping the zeros. The masks stay known."""
        self._hooks.close()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_state is not None:  # of a resumed run, so that dropout continues its sequence
            torch.set_rng_state(self._random_state)
            if self._random_state_of_device is not None and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(self._random_state_of_device, pl_module.device)
            self._random_state = self._random_state_of_device = None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._masks is not None:
            self._masks.mask_gradients()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        for callback in later:
            # Copy the average of a later callback into the module now, because it is what is checked, measured and exported.
            # Lightning calls this hook of the callback again afterwards. SWA with batch norm is left out: it copied its average
            # an epoch earlier, and its hook resets settings of the Trainer, which must happen only once.
            if isinstance(callback, AVERAGING) and not getattr(callback, "_model_contains_batch_norm", False):
                callback.on_train_end(trainer, pl_module)
        if self._masks is not None and any(isinstance(c, AVERAGING) for c in trainer.callbacks):  # type: ignore[attr-defined]
            changed = self._masks.keep_nonzero()
            if changed:  # later ones copy their average once more
                renew_averages(later, pl_module)
        self._check()
        self.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._masks = None  # it holds the model and, through the strategy, the optimizer's state

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.release()

    def state_dict(self) -> dict[str, Any]:
        if not self._zeros:
            return {}
        states = {"random_state": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            states["random_state_of_device"] = torch.cuda.get_rng_state()
        return {"zeros": self._zeros, **states}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Evaluation loads checkpoints too, and Lightning's tuners load their own.
        self._resumes = trainer.state.fn == TrainerFn.FITTING and resumed(trainer) is not None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._resumes:
            return
        self._stored = dict(state_dict.get("zeros", {}))
        self._random_state = state_dict.get("random_state")
        self._random_state_of_device = state_dict.get("random_state_of_device")

    def _apply(self) -> None:
        if self._masks is not None:
            self._masks.apply()

    def _check(self) -> None:
        if self._masks is not None:
            self._masks.check()
            self.checks += 1

    def _compare_with_stored(self) -> None:
        stored, self._stored = self._stored, {}
        for name, zeros in stored.items():
            found = self._zeros.get(name)
            if found != zeros:
                raise UserError(
                    f"The checkpoint was saved with {zeros} zeros in {name}, but the weights restored from it have {found}. "
                    "Resume from the checkpoint that belongs to these weights; to fine-tune other sparse weights, start a new "
                    "run from them (CausalLM(weights=...)) instead of resuming."
                )


@contextmanager
def _after_steps(optimizer: torch.optim.Optimizer, do: Callable[[], None]) -> Iterator[None]:
    """Call a function directly after every step of an optimizer."""
    step = optimizer.step

    @wraps(step)
    def stepped(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        do()
        return result

    # Not torch's hooks: optimizers that wrap another, such as Lookahead, may have none, or never call them.
    with patched(optimizer, "step", MethodType(stepped, optimizer)):  # schedulers need a method
        yield


def resumed(trainer: pl.Trainer) -> Any:
    """The checkpoint from which the run resumes. None without one, and for the temporary ones of Lightning's tuners."""
    path = trainer.ckpt_path
    return None if path is None or Path(path).name.startswith((".lr_find_", ".scale_batch_size_")) else path


def renew_averages(callbacks: Sequence[pl.Callback], pl_module: pl.LightningModule) -> None:
    """Have callbacks that average weights begin anew with those of the module."""
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, AVERAGING) and average is not None:
            copied = average.module if isinstance(average, AveragedModel) else average
            for mine, theirs in zip(_tensors(copied), _tensors(pl_module), strict=False):
                mine.data.copy_(theirs.data)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    # Not those of state_dict(), from which a module may leave some out.
    return chain(module.parameters(), module.buffers())


def kept_layers(
    trainer: pl.Trainer, pl_module: pl.LightningModule, held: Sequence[Projection] = ()
) -> list[Projection]:
    """The layers whose zeros are kept: those that are held in any case, and the other sparse ones. Warns of other zeros.

    Raises:
        UserError: none are held in any case, and none are sparse.
    """
    layers, known, adapter = linear_layers(pl_module), {id(p.parameter) for p in held}, adapter_for(trainer)
    shares = zero_shares(layers, adapter)
    if not held and not any(SPARSE <= share < 1 for share in shares.values()):
        raise UserError(
            f"SparseFinetuning keeps the zeros of a sparse model, but no linear layer of {type(pl_module).__name__} has "
            "1 % of zeros. Prune it first (SparseLLMCallback(finetune=True) does both), or load a sparse model."
        )
    kept = [*held, *(p for p in sparse_layers(layers, shares, adapter) if id(p.parameter) not in known)]
    _warn_of_lost_zeros(pl_module, layers, shares, kept)
    return kept


def _warn_of_lost_zeros(
    module: pl.LightningModule, layers: Sequence[Projection], shares: dict[str, float], held: Sequence[Projection]
) -> None:
    """Name the layers, embeddings and other matrices that train and whose zeros are not kept."""
    kept = {id(p.parameter) for p in held}
    free = [(p.name, shares[p.name]) for p in layers if id(p.parameter) not in kept]
    lost = [f"{name} ({'zeros only' if share == 1 else 'rows of zeros'})" for name, share in free if share]
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    known = {id(p.parameter) for p in layers}
    for name, parameter in module.named_parameters():
        local, embeds = local_tensor(parameter), id(parameter) in embeddings
        if id(parameter) in known or not parameter.requires_grad or not local.numel() or "lora_" in name:
            continue
        if (local.dim() >= 2 or embeds) and SPARSE <= int((local == 0).sum()) / local.numel() < 1:
            lost.append(name.removesuffix(".weight") + " (an embedding, and a head tied to it)" * embeds)
    if lost:
        rank_zero_warn(f"The zeros of {', '.join(lost)} are not kept in training. Freeze these weights to keep them.")
