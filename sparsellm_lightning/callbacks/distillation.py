"""Distillation: the dense model teaches the sparse one in fine-tuning."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import (
    decoder_blocks,
    device_of,
    find_model,
    hidden_states,
    patched,
    without_cache,
)
from sparsellm_lightning.callbacks.finetuning import resumed
from sparsellm_lightning.distributed import StrategyAdapter, adapter_for, load_sharded
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import check_dtype, kept_in_float32, load_model, pretrained_of
from sparsellm_lightning.solvers import kl_divergence
from sparsellm_lightning.sparsity import linear_layers, pruned_before


def logit_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None, *, reuse: bool = False
) -> Tensor:
    """``T² · mean KL(softmax(t / T) ‖ softmax(s / T))`` over tokens (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits, (..., classes), any dtype. Computed in float32.
        temperature: T. The factor T² makes the size of the gradient independent of T.
        valid: (...) bool, tokens that count. None: all. The loss of no tokens is 0.
        reuse: the gradient may overwrite ``teacher``, to save memory.
    """
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    reuse = reuse and student.dtype == teacher.dtype
    divergence = kl_divergence(teacher.flatten(0, -2), student.flatten(0, -2), temperature, reuse=reuse)
    return temperature**2 * divergence.sum() / max(len(divergence), 1)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
    """``mean over blocks of ‖h_s − h_t‖² / ‖h_t‖²`` of the blocks' outputs: SquareHead (Kurtic et al., arXiv 2310.06927).

    Args:
        student, teacher: by block, (batch, sequence, d), any dtype. Computed in float32.
        valid: (batch, sequence) bool, tokens that count. None: all.
    """
    losses = []
    for s, t in zip(student, teacher, strict=True):
        s, t = (s.float(), t.float()) if valid is None else (s[valid].float(), t[valid].float())
        losses.append((s - t).square().sum() / t.square().sum().clamp(min=1e-12))
    return torch.stack(losses).mean()


class Distillation(pl.Callback):
    """Add a dense teacher to the loss of any LightningModule that trains a ``transformers`` model.

    The loss becomes ``task_weight · L + logit_weight · logit_loss + feature_weight · feature_loss``, where L is the return
    value of the module's ``training_step``. The teacher sees the student's inputs. Works with
    :class:`~sparsellm_lightning.SparseLLMCallback` and :class:`~sparsellm_lightning.SparseFinetuning`, in any order.

    Args:
        teacher: a model, or a name that :func:`~sparsellm_lightning.load_model` takes. None: the model that the module's
            ``pretrained`` names (:class:`~sparsellm_lightning.CausalLM` has it). If the module has no ``pretrained``: a frozen
            copy of its model at the start of the run; a resumed run or a sharded model then needs a name. The teacher must be
            dense.
        temperature: of the logit loss.
        task_weight: of the module's own loss.
        logit_weight: of :func:`logit_loss`.
        feature_weight: of :func:`feature_loss`.
        teacher_dtype: of the teacher's weights: ``auto``, or ``bfloat16`` to halve its memory. A model that is given in another
            dtype is copied.
        offload: keep the teacher in host memory and bring one block at a time to the accelerator.
        model_attribute: attribute of the LightningModule that holds the student, if it holds several models.

    Raises:
        UserError: weights or temperature out of range, at construction; no dense teacher, a second Distillation, or manual
            optimisation, before training.
    """

    def __init__(
        self,
        teacher: str | Path | PreTrainedModel | None = None,
        temperature: float = 1.0,
        task_weight: float = 0.5,
        logit_weight: float = 0.5,
        feature_weight: float = 0.0,
        teacher_dtype: str = "auto",
        offload: bool = False,
        model_attribute: str | None = None,
    ) -> None:
        weights = (task_weight, logit_weight, feature_weight)
        if not all(weight >= 0 for weight in weights) or not logit_weight + feature_weight > 0:  # also NaN
            raise UserError(
                "Distillation needs weights of at least 0, and logit_weight or feature_weight above 0, got task_weight "
                f"{task_weight}, logit_weight {logit_weight}, feature_weight {feature_weight}. Set one of the two weights, "
                "or remove Distillation."
            )
        if not temperature > 0:
            raise UserError(f"temperature must be positive, got {temperature}. 1 is usual.")
        self.teacher = teacher
        self.temperature = temperature
        self.task_weight, self.logit_weight, self.feature_weight = task_weight, logit_weight, feature_weight
        self.teacher_dtype = teacher_dtype
        self.offload = offload
        self.model_attribute = model_attribute
        self._model: PreTrainedModel | None = None
        self._patched = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a run: spawned workers of a DataLoader may get the Trainer, pickled."""
        return vars(self) | {"_model": None, "_patched": ExitStack()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise UserError(
                f"Distillation adds to the loss that training_step returns, but {type(pl_module).__name__} has "
                "automatic_optimization false and takes its own backward. Leave Distillation out, or optimise automatically."
            )
        if sum(isinstance(callback, Distillation) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError(
                "The Trainer has several Distillation callbacks, but a step has one teacher. Keep one of them."
            )
        # The model exists here. A run that prunes has not pruned yet, unless it resumes.
        model = self._make_teacher(trainer, pl_module)
        self._check_alike(find_model(pl_module, self.model_attribute), model)
        if model is self.teacher:
            self._patched.enter_context(_put_back(model))
        self._model = model.eval().requires_grad_(False)
        if self.offload and isinstance(self._model, FSDPModule):
            raise UserError(
                "Distillation cannot offload a teacher whose weights are sharded over ranks, which hold a part of it each. Set "
                "offload to false."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._model is not None
        student = find_model(pl_module, self.model_attribute)
        if self.offload:
            self._patched.enter_context(_brought_in_turn(self._model, pl_module.device))
        # No hook of a callback may change the loss. A partial function can be pickled; Lightning reads its signature.
        original = pl_module.training_step
        step = wraps(original)(partial(self._step, original, pl_module, student))
        self._patched.enter_context(patched(pl_module, "training_step", step))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        self._patched.close()
        self._model = None

    def _make_teacher(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PreTrainedModel:
        student = find_model(pl_module, self.model_attribute)
        source = pretrained_of(pl_module) if self.teacher is None else self.teacher
        if isinstance(source, (str, Path)):
            path, mesh = source, pl_module.device_mesh
            if mesh is not None:
                teacher = load_sharded(lambda: load_model(path, self.teacher_dtype), mesh["data_parallel"])
            else:
                teacher = load_model(path, self.teacher_dtype)
            adapter = StrategyAdapter() if mesh is None else adapter_for(trainer)
            if self.teacher is None and pruned_before(linear_layers(teacher), adapter):
                raise UserError(
                    f"Distillation needs a dense teacher, but {path}, the model that is trained, is already sparse. Give "
                    "teacher: the path or hub id of the dense model."
                )
            return teacher
        if source is None or source is student:
            if adapter_for(trainer).weights_are_split:
                raise UserError(
                    "Distillation cannot copy a model that is sharded over ranks. Give teacher: the path or hub id of the "
                    "dense model."
                )
            pruned = pruned_before(linear_layers(pl_module), adapter_for(trainer))
            if resumed(trainer) is not None or pruned:
                raise UserError(
                    "Distillation needs a dense teacher, but the model it would copy is already sparse, or resumes a run that "
                    "may have pruned it. Give teacher: the path or hub id of the dense model."
                )
            device = device_of(student)
            source = copy.deepcopy(student.cpu())  # the device may have no room for it before pruning ends
            student.to(device)  # type: ignore[arg-type]
        if self.teacher_dtype == "auto":
            return source
        dtype = check_dtype(self.teacher_dtype)
        if any(p.dtype != dtype for p in source.parameters() if p.is_floating_point()):
            source = copy.deepcopy(source) if source is self.teacher else source
            with kept_in_float32(source):
                source.to(dtype)  # type: ignore[arg-type]
        return source

    def _check_alike(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse a teacher whose outputs cannot be compared with the student's, as far as the configurations say."""
        configs = [model.config.get_text_config(decoder=True) for model in (student, teacher)]
        with_heads = all(model.get_output_embeddings() is not None for model in (student, teacher))
        compared = {"vocab_size": bool(self.logit_weight) and with_heads}
        compared |= dict.fromkeys(("num_hidden_layers", "hidden_size"), bool(self.feature_weight))
        for name in (name for name, asked in compared.items() if asked):
            ours, theirs = (getattr(config, name, None) for config in configs)
            if None not in (ours, theirs) and ours != theirs:
                weight = "logit_weight" if name == "vocab_size" else "feature_weight"
                raise UserError(
                    f"Distillation with {weight} needs a teacher with the student's {name}, {ours}, but it has {theirs}. "
                    f"Choose another teacher, or set {weight} to 0."
                )

    def _step(
        self,
        original: Callable[..., Any],
        pl_module: pl.LightningModule,
        student: PreTrainedModel,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The module's own step, with the teacher in its loss."""
        with _recording(student, features=self.feature_weight > 0) as calls:
            outputs = original(*args, **kwargs)
        if outputs is None:
            return None
        loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
        # Samples and reference passes train nothing.
        trained = [call for call in calls if call.logits is None or call.logits.requires_grad]
        loss = self.task_weight * loss + self._loss(pl_module, trained)
        return loss if isinstance(outputs, Tensor) else {**outputs, "loss": loss}

    def _loss(self, pl_module: pl.LightningModule, calls: list[_Call]) -> Tensor:
        teacher = self._model
        assert teacher is not None
        if not calls:
            raise UserError(
                "Distillation compares the student's forwards, but training_step made none with gradients through the "
                "model's own forward. Call the transformers model itself, not its parts, and train some of its weights."
            )
        if not (self.offload or isinstance(teacher, FSDPModule)):
            teacher.to(pl_module.device)  # type: ignore[arg-type]  # not earlier: pruning may need the room until the first step
        total: Tensor | float = 0.0
        parts: defaultdict[str, Any] = defaultdict(float)  # over the forwards of a step
        for call in calls:
            with torch.no_grad(), _recording(teacher, features=self.feature_weight > 0) as seen:
                inputs = {key: value for key, value in call.inputs.items() if key not in ("labels", "use_cache")}
                teacher(**inputs, **without_cache(teacher))
            mask = call.inputs.get("attention_mask")
            valid = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            if self.logit_weight:
                if call.inputs.get("return_dict", True) is False:
                    raise UserError(
                        "Distillation reads the logits of the model's output, but training_step calls the model with "
                        "return_dict false. Leave return_dict out, or set logit_weight to 0."
                    )
                if call.logits is None or seen[0].logits is None or call.logits.shape != seen[0].logits.shape:
                    shapes = [None if x is None else tuple(x.shape) for x in (call.logits, seen[0].logits)]
                    raise UserError(
                        f"Distillation by logits needs logits of one shape from both models, got shapes {shapes[0]} and "
                        f"{shapes[1]}. Choose a teacher with the same head and vocabulary, or set logit_weight to 0."
                    )
                tokens = _of_kept_logits(valid, call.inputs) if call.logits.dim() == 3 else None
                loss = logit_loss(call.logits, seen[0].logits, self.temperature, tokens, reuse=True)
                parts["logit"] += loss.detach()
                total = total + self.logit_weight * loss
            if self.feature_weight:
                if len(call.features) != len(seen[0].features) or not call.features:
                    raise UserError(
                        f"feature_weight needs equally many decoder blocks, got {len(call.features)} of the student and "
                        f"{len(seen[0].features)} of the teacher. Choose another teacher, do not compile the model as a whole, "
                        "or set feature_weight to 0."
                    )
                loss = feature_loss(call.features, seen[0].features, valid)
                parts["feature"] += loss.detach()
                total = total + self.feature_weight * loss
        for name, part in parts.items():
            pl_module.log(f"distillation_{name}_loss", part)
        assert isinstance(total, Tensor)
        return total


@dataclass
class _Call:
    """One forward of a model: its arguments by name, its logits, and the outputs of its blocks."""

    inputs: dict[str, Any]
    logits: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)


@contextmanager
def _put_back(model: PreTrainedModel) -> Iterator[None]:
    """Behind this context the model is as its owner gave it: its device, the modes of its modules, what has gradients."""
    device, modes = model.device, [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    if model.device != device:
        model.to(device)  # type: ignore[arg-type]
    for module, training in modes:
        module.training = training
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


@contextmanager
def _recording(model: PreTrainedModel, features: bool) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(_by_name(model.forward, args, kwargs)))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[-1].logits = getattr(output, "logits", None)

    def block(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[-1].features.append(hidden_states(output))

    with ExitStack() as handles:
        for handle in (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
            *(module.register_forward_hook(block) for module in (decoder_blocks(model) if features else ())),
        ):
            handles.callback(handle.remove)
        yield calls


def _of_kept_logits(valid: Tensor | None, inputs: dict[str, Any]) -> Tensor | None:
    """``valid`` at the positions that have logits: all, the last ``logits_to_keep`` ones, or those whose indices it holds."""
    kept = inputs.get("logits_to_keep", 0)
    if valid is None or (isinstance(kept, int) and not kept):
        return valid
    return valid[:, -kept:] if isinstance(kept, int) else valid[:, kept]


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those among ``**kwargs`` too."""
    signature = inspect.signature(function)
    named = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


@contextmanager
def _brought_in_turn(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Each block, and each layer outside the blocks, is on the device only during its own forward."""
    blocks = decoder_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    others = [module for module in outside if any(True for _ in module.parameters(recurse=False))]
    with ExitStack() as handles:
        for module in outside:  # buffers alone, such as tables of positions, are small
            for name, buffer in module.named_buffers(recurse=False):
                handles.callback(module._buffers.__setitem__, name, buffer)
                module._buffers[name] = buffer.to(device)
        for module in (*blocks, *others):
            module.to("cpu")
            on_host = [(parameter, parameter.data) for parameter in module.parameters()]
            handles.callback(module.register_forward_pre_hook(lambda m, args: m.to(device) and None).remove)
            handles.callback(module.register_forward_hook(partial(_leave, on_host)).remove)
        yield


def _leave(on_host: list[tuple[torch.nn.Parameter, Tensor]], module: torch.nn.Module, args: Any, output: Any) -> None:
    """Take a module off the device. Its parameters have not changed, so that nothing is copied back."""
    for parameter, data in on_host:
        parameter.data = data
    module.to("cpu")  # its buffers
