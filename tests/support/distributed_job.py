"""What the processes of the distributed tests run: started by Lightning's own launcher, once per process.

    python distributed_job.py FOLDER JOB.json

The job names the strategy, the number of processes and what to do; rank-dependent results go to files in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    LoraOptions,
    PruningConfig,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
)
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.config import Reconstruction
from sparsellm_lightning.distributed import FSDP2Strategy, ProcessGroupRanks
from sparsellm_lightning.sparsity import local_tensor

torch.set_num_threads(1)


class Job:
    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.processes = options.get("processes", 1)

    def strategy(self) -> Any:
        kind, sharded_checkpoint = self.options.get("strategy"), self.options.get("sharded_checkpoint", True)
        backend = "gloo" if self.options.get("accelerator", "cpu") == "cpu" else None
        if kind == "ddp":
            return DDPStrategy(process_group_backend=backend)
        if kind == "fsdp2":
            return FSDP2Strategy(save_distributed_checkpoint=sharded_checkpoint, process_group_backend=backend)
        if kind == "fsdp1":
            return FSDPStrategy(auto_wrap_policy=_decoder_layer)
        if kind == "tensor_parallel":
            return ModelParallelStrategy(1, self.processes, process_group_backend=backend)
        return "auto"

    def trainer(self, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator=self.options.get("accelerator", "cpu"),
            devices=self.processes,
            strategy=self.strategy(),
            precision=self.options.get("precision", "32-true"),
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=str(self.folder),
            **kwargs,
        )

    def module(self, **kwargs: Any) -> CausalLM:
        pl.seed_everything(0, verbose=False)  # adapters start at random
        if self.options.get("lora"):
            kwargs["lora"] = LoraOptions(rank=4)
        module = (Compiled if self.options.get("compile") else CausalLM)(self.options["model"], **kwargs)
        module.optimizer = Mixing if self.options.get("mixing") else lambda p: torch.optim.AdamW(p, lr=1e-3)
        return module

    def data(self) -> TextDataModule:
        batch_size = self.options.get("batch_size", 4)
        return TextDataModule("python-docs", sequence_length=64, batch_size=batch_size, max_eval_windows=16)

    def pruner(self, **kwargs: Any) -> SparseLLMCallback:
        settings = {**self.options.get("pruner", {}), **kwargs}
        if settings.get("reconstruct"):
            settings["reconstruct"] = Reconstruction(**settings["reconstruct"])
        return Observed(**settings)


class Mixing(torch.optim.SGD):
    """Spreads the row's mean gradient over every entry, so that masked gradients alone keep no zero."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and p.dim() == 2:
                p.sub_(0.05 * p.grad.mean(-1, keepdim=True).expand(p.shape))
        return loss


class Compiled(CausalLM):
    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.model.model.layers:
            layer.compile(backend="eager")
            layer.gradient_checkpointing = True


class Observed(SparseLLMCallback):
    """Notes the traffic of this rank, and the size of the largest tensor a rank ever gathers."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sent = {"elements": 0, "largest": 0}
        original = ProcessGroupRanks.gather
        ProcessGroupRanks.gather = lambda ranks, tensor: (  # type: ignore[method-assign]
            sent.update(largest=max(sent["largest"], tensor.numel() * ranks.size)) or original(ranks, tensor)
        )
        made: list[ProcessGroupRanks] = []
        init = ProcessGroupRanks.__init__
        ProcessGroupRanks.__init__ = lambda ranks, *args: (init(ranks, *args), made.append(ranks))[0]  # type: ignore[method-assign]
        try:
            super().on_train_start(trainer, pl_module)
        finally:
            ProcessGroupRanks.gather, ProcessGroupRanks.__init__ = original, init  # type: ignore[method-assign]
        sent["elements"] = sum(ranks.elements for ranks in made)
        folder = Path(trainer.default_root_dir)
        (folder / f"traffic_{trainer.global_rank}.json").write_text(json.dumps(sent))
        layout = describe(self._model(pl_module), PruningConfig(preset="paper"))
        if trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy):
            weights = {p.name: p.parameter.detach() for p in layout.projections()}
            weights |= {name: p.detach() for name, p in self._model(pl_module).named_parameters() if "norm" in name}
            torch.save(weights, folder / f"weights_{trainer.global_rank}.pt")


def _decoder_layer(module: torch.nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return recurse or type(module).__name__.endswith("DecoderLayer")


def prune(job: Job) -> None:
    job.trainer(job.pruner(export_dir=str(job.folder / "out"))).fit(job.module(), job.data())


def prune_from_train_loader(job: Job) -> None:
    """No datamodule: calibration windows come from a training dataloader, which Lightning shards over the ranks."""
    windows = torch.cat([batch["input_ids"] for batch in _windows(job, 24)])
    pruner = job.pruner(export_dir=str(job.folder / "out"))
    job.trainer(pruner).fit(
        job.module(), torch.utils.data.DataLoader([{"input_ids": row} for row in windows], batch_size=4)
    )


def _windows(job: Job, count: int) -> Any:
    data = job.data()
    data.tokenizer = job.options["model"]
    return data.calibration_dataloader(num_samples=count)


class Generates(pl.Callback):
    """Saves the calibration windows of each rank, more than once: the first draws must not depend on the length of the last."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        draws = [
            torch.cat([batch["input_ids"] for batch in trainer.datamodule.calibration_dataloader(count, seed=1)])
            for count in (1, 7)
        ]
        torch.save(draws, Path(trainer.default_root_dir) / f"windows_{trainer.global_rank}.pt")
        trainer.should_stop = True


def generate(job: Job) -> None:
    data = TextDataModule("self", sequence_length=32, batch_size=3)
    job.trainer(Generates()).fit(job.module(), data)


class ZerosHeld(pl.Callback):
    """On every rank: the local zeros are the same after every step, and the local kept weights move."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.local(pl_module).items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for name, tensor in self.local(pl_module).items():
            before = self.before[name]
            assert torch.equal(tensor == 0, before == 0), f"{name} at step {trainer.global_step}"
            if "base_layer" not in name:
                assert before.numel() == 0 or bool((tensor != before).any()), f"{name} stands still"

    @staticmethod
    def local(module: pl.LightningModule) -> dict[str, torch.Tensor]:
        named = {
            name: local_tensor(p) for name, p in module.named_parameters() if "proj" in name and "lora" not in name
        }
        return {name: tensor for name, tensor in named.items() if bool((tensor == 0).any())}


def life(job: Job) -> None:
    """Prune, train, save, resume, export; beside it a run that is not stopped, and a new one from the sparse weights."""
    watch = ZerosHeld()
    taught = [Distillation(job.options["model"])] if job.options.get("distilled") else []

    def pruner(out: str | None = None) -> SparseLLMCallback:
        return job.pruner(finetune=True, export_dir=out and str(job.folder / out))

    job.trainer(pruner("unstopped"), watch, *taught, max_steps=4).fit(job.module(), job.data())
    first = job.trainer(pruner(), watch, *taught, max_steps=2)
    first.fit(job.module(), job.data())
    checkpoint = str(job.folder / "stopped.ckpt")
    first.save_checkpoint(checkpoint)

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pruned again")

    import sparsellm_lightning.callback as callback

    callback.prune_model = again  # type: ignore[assignment]
    job.trainer(pruner("out"), watch, *taught, max_steps=4).fit(job.module(), job.data(), ckpt_path=checkpoint)
    if not job.options.get("lora"):
        new = job.trainer(SparseFinetuning(), watch, max_steps=1)
        new.fit(job.module(weights=checkpoint), job.data())
        assert new.global_step == 1


def fail(job: Job) -> None:
    """One rank raises in the middle of the solve."""
    import sparsellm_lightning.walker as walker

    original = walker.solve_feed_forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        if dist.get_rank() == job.options["failing_rank"] and kwargs["name"].startswith("model.layers.1"):
            raise job_error(job.options["error"])
        return original(*args, **kwargs)

    walker.solve_feed_forward = failing  # type: ignore[assignment]
    prune(job)


def job_error(name: str) -> BaseException:
    return {"ValueError": ValueError("a bad batch"), "KeyboardInterrupt": KeyboardInterrupt()}[name]


if __name__ == "__main__":
    where, description = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    globals()[description["job"]](Job(where, description))
