"""The package on a device that is not the CPU, see ``support.accelerator``: nothing mixes devices, results are the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch._C._acc", reason="this torch has no backends in Python")

from lightning.pytorch.strategies import SingleDeviceStrategy
from support.accelerator import DEVICE, Accelerator, OnAccelerator, accelerator, moved
from support.batches import random_batches
from support.models import build_model
from support.training import Module, ZeroWatch, trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, XGLMConfig, XGLMForCausalLM

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    LoraOptions,
    PruningConfig,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    generate_windows,
    holding_zeros,
    prune_model,
    verify_export,
)
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.callbacks.distillation import _brought_in_turn
from sparsellm_lightning.pipeline import sequential
from sparsellm_lightning.pipeline.kept import KeptParameters, memory_of_tuning


@pytest.fixture
def device() -> Iterator[torch.device]:
    with accelerator() as there:
        yield there


def config(**settings: Any) -> PruningConfig:
    # In bfloat16 a CPU with matrix units computes otherwise than this device, which has none.
    return PruningConfig(num_calibration_samples=8, solver_precision="float32", **settings)


def assert_close(one: nn.Module, other: nn.Module) -> None:
    """Equal to rounding: this device multiplies with MKL where the CPU may use oneDNN."""
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight.detach().cpu(), expected.detach().cpu(), rtol=1e-3, atol=1e-3, msg=name)


def test_the_device_refuses_what_a_gpu_refuses(device: torch.device) -> None:
    there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
    assert isinstance(there, OnAccelerator)
    assert there.device == DEVICE
    for mixed in (
        lambda: there + here,
        lambda: torch.mm(there, here.T),
        lambda: torch.cat([there, here]),
        lambda: here[torch.tensor([0, 1], device=device)],
        lambda: there.masked_fill_(here > 0, 0),
        lambda: there.numpy(),
        lambda: torch.mm(there, there.T, out=torch.empty(2, 2)),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    assert torch.equal((there + here.to(device)).cpu(), torch.full((2, 3), 2.0))
    assert there[torch.tensor([1])].device == DEVICE
    here.copy_(there * 2.0)
    assert here.tolist() == [[2.0] * 3] * 2


# Bytes: room for the work on a block of the tiny LLaMA, not for its activations.
LITTLE = 1_300_000
# Room for the activations of a step of distillation, not for Adam's moments at 50 % too.
FOR_A_STEP = 3_200_000
OTHERS = ("opt-350m", "gemma2")
SETTINGS: dict[str, dict[str, Any]] = {
    "wanda": {"preset": "paper", "method": "wanda", "pattern": "2:4"},
    "sparsegpt": {"preset": "paper", "method": "sparsegpt"},
    "admm": {"preset": "paper", "method": "admm"},
    "paper": {"preset": "paper"},
    "paper 2:4": {"preset": "paper", "pattern": "2:4"},
    "balanced": {"preset": "balanced", "reconstruction_steps": 8, "distillation_steps": 2},
    "best": {"preset": "best", "reconstruction_steps": 4, "distillation_steps": 2},
    "owl": {"preset": "fast", "allocation": "owl"},
    "on the host": {"preset": "paper", "target": "model", "memory": LITTLE},
    "on the host, tuned": {
        "preset": "balanced",
        "sparsity": 0.5,
        "reconstruction_steps": 4,
        "distillation_steps": 2,
        "memory": FOR_A_STEP,
    },
}


CASES = [
    *(
        pytest.param("llama", name, marks=() if name in ("paper", "on the host") else pytest.mark.slow)
        for name in SETTINGS
    ),
    *(pytest.param(name, "balanced", marks=pytest.mark.slow) for name in OTHERS),
]


def zeros_of(model: PreTrainedModel) -> list[torch.Tensor]:
    return [(p.matrix.cpu() == 0).flatten() for p in describe(model).projections()]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_prune(device: torch.device, name: str, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storages: list[torch.device] = []

    class Recorded(KeptParameters):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            storages.append(self.storage)

    monkeypatch.setattr("sparsellm_lightning.pipeline.distil.KeptParameters", Recorded)
    chosen = config(**{"sparsity": None if "2:4" in SETTINGS[settings].values() else 0.6, **SETTINGS[settings]})
    expected, model = build_model(name), moved(build_model(name))
    prune_model(expected, random_batches(), replace(chosen, memory="auto"))
    prune_model(model, random_batches(), chosen)
    assert all(parameter.device == DEVICE for parameter in model.parameters())
    same = torch.cat([zeros == others for zeros, others in zip(zeros_of(model), zeros_of(expected), strict=True)])
    assert float(same.double().mean()) > 0.95  # half of two masks at random; rounding moves a few close decisions
    if settings == "on the host, tuned":
        assert storages[-1].type == "cpu"
    elif chosen.distillation_steps:
        assert storages[-1] == DEVICE
    if settings in ("wanda", "sparsegpt", "paper"):
        assert_close(model, expected)


def test_resume(device: torch.device, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(block: int, iteration: int, error: float) -> None:
        if block == 1:
            raise Killed

    settings = config(preset="paper", num_iterations=2, continuations=1, sparsity=0.6)
    whole, model = (moved(build_model("llama")) for _ in range(2))
    prune_model(whole, random_batches(), settings)
    with pytest.raises(Killed):
        prune_model(model, random_batches(), settings, resume_dir=tmp_path, on_iteration=kill)
    again = moved(build_model("llama"))
    prune_model(again, random_batches(), settings, resume_dir=tmp_path)
    for weight, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight.cpu(), expected.cpu())


def test_generate_windows(device: torch.device) -> None:
    windows = generate_windows(moved(build_model("llama")), 6, 16, batch_size=4, seed=0)
    expected = generate_windows(build_model("llama"), 6, 16, batch_size=4, seed=0)
    assert float((windows.cpu() == expected).float().mean()) > 0.9


def on_device(*callbacks: Any, **options: Any) -> Any:
    return trainer(*callbacks, accelerator=Accelerator(), strategy=SingleDeviceStrategy(DEVICE), devices=1, **options)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, pytest.param(torch.optim.SGD, marks=pytest.mark.slow)])
def test_fit_and_export(
    device: torch.device, tmp_path: Path, model_dir: Path, text: TextDataModule, optimizer: Any
) -> None:
    """Prune, train with the zeros held and a dense teacher, measure, export."""
    module = CausalLM(str(model_dir), optimizer=lambda parameters: optimizer(parameters, lr=1e-3))
    pruner = SparseLLMCallback(
        preset="balanced",
        sparsity=0.6,
        reconstruction_steps=2,
        distillation_steps=2,
        num_calibration_samples=8,
        finetune=True,
        export_dir=str(tmp_path / "out"),
        resume_dir=str(tmp_path / "journal"),
    )
    watch = ZeroWatch()
    on_device(pruner, Distillation(str(model_dir)), watch, max_steps=4).fit(module, text)
    assert watch.looks > 4
    assert verify_export(tmp_path / "out", text.val_dataloader()) == []


def test_lora(device: torch.device, model_dir: Path, text: TextDataModule, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    module = CausalLM(str(model_dir), lora=LoraOptions(rank=2))
    pruner = SparseLLMCallback(
        preset="paper", method="wanda", sparsity=0.5, finetune=True, export_dir=str(tmp_path / "out")
    )
    on_device(pruner, max_steps=2).fit(module, text)
    assert verify_export(tmp_path / "out") == []


def test_finetuning_of_a_sparse_model(device: torch.device, tmp_path: Path) -> None:
    model = build_model("llama")
    prune_model(model, random_batches(), config(preset="paper", method="wanda", sparsity=0.6))
    before = {name: p.detach() == 0 for name, p in model.named_parameters() if "proj" in name}
    data = DataLoader(torch.cat([batch["input_ids"] for batch in random_batches()]), batch_size=2)
    fit = on_device(SparseFinetuning(), max_steps=3)
    fit.fit(Module(model, lambda p: torch.optim.AdamW(p, lr=1e-2)), data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter.detach().cpu() == 0, before[name])


def test_a_model_on_two_devices_is_refused(device: torch.device) -> None:
    model = build_model("llama")
    model.model.layers[1].to(DEVICE)
    with pytest.raises(UserError, match=r"a model on one device.*cpu.*device_map"):
        prune_model(model, random_batches(), config(preset="paper", method="wanda", sparsity=0.5))


def test_no_room_for_moments_on_the_host(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = moved(build_model("llama")), config(preset="balanced", sparsity=0.5, reconstruction_steps=0)
    gradients, _ = memory_of_tuning(describe(model, settings).blocks, settings)
    rooms = {"cpu": 1000.0, DEVICE.type: gradients + 1}
    monkeypatch.setattr("sparsellm_lightning.pipeline.distil.room", lambda budget, where: rooms[where.type])
    monkeypatch.setattr("sparsellm_lightning.pipeline.distil.activations_of_tuning", lambda *_: 0.0)
    with pytest.warns(UserWarning, match="goes without distillation: .*neither device nor host"):
        prune_model(model, random_batches(), settings)


def test_hidden_states_in_front_of_the_first_block_keep_to_the_budget(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    capture = sequential.capture

    def captured(*args: Any) -> Any:
        cache = capture(*args)
        seen.extend(hidden.device.type for hidden in cache.hidden)
        return cache

    monkeypatch.setattr(sequential, "capture", captured)
    monkeypatch.setattr("sparsellm_lightning.calibration.forward.room", lambda budget, where: 100.0)
    prune_model(moved(build_model("llama")), random_batches(), config(preset="paper", method="wanda", sparsity=0.5))
    assert set(seen) == {"cpu"}


def test_masks_of_a_model_that_moves(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight.data[:, ::2] = 0
    with holding_zeros(model):
        model.to(DEVICE)
        weight = model[0].weight
        weight.data.add_(1)
        weight.grad = torch.zeros_like(weight)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert int((model[0].weight == 0).sum()) == 32


def test_buffers_of_an_offloaded_teacher(device: torch.device) -> None:
    """XGLM's table of positions is a buffer of a module without parameters, outside the blocks."""
    model = build_xglm()
    with _brought_in_turn(model, DEVICE):
        model(torch.ones(1, 4, dtype=torch.long, device=DEVICE))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def build_xglm() -> Any:
    sizes = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}
    return XGLMForCausalLM(XGLMConfig(vocab_size=64, **sizes)).eval()
