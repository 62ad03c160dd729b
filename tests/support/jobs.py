"""Jobs of the distributed tests. Every rank runs the same job.

The processes of ``support.pool`` run them, or Lightning's own launcher:

    python jobs.py FOLDER JOB.json

The options name the strategy, the number of processes, the model and the settings of the pruner.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    LoraOptions,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    holding_zeros,
    perplexity,
)
from sparsellm_lightning.architecture import decoder_blocks, describe
from sparsellm_lightning.distributed import (
    FSDP2Strategy,
    ProcessGroupRanks,
    adapter_for,
    failing_with_first,
    local_tensor,
    shard_blocks,
)
from sparsellm_lightning.distributed.fsdp2 import FSDP2Adapter


def run(name: str, folder: Path, options: dict[str, Any]) -> Any:
    """Run a job of this module.

    Args:
        name: of the function.
        folder: of the job's files.
        options: of the job. ``constants``: values by dotted name, which replace the package's while the job runs.
    """
    with ExitStack() as stack:
        for target, value in options.get("constants", {}).items():
            stack.enter_context(mock.patch(target, value))
        return globals()[name](Job(folder, options))


class Job:
    """What the options ask for."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.processes = options.get("processes", 1)

    def strategy(self) -> Any:
        kind, sharded_checkpoint = self.options.get("strategy"), self.options.get("sharded_checkpoint", True)
        backend = "nccl" if self.options.get("accelerator") == "gpu" else "gloo"
        if kind == "ddp":
            return DDPStrategy(process_group_backend=backend)
        if kind == "fsdp2":
            return FSDP2Strategy(save_distributed_checkpoint=sharded_checkpoint, process_group_backend=backend)
        if kind == "fsdp1":
            return FSDP1OnAnyDevice(
                auto_wrap_policy=partial(_wraps, self.options.get("wrapped", ("DecoderLayer", "GPT2Block"))),
                process_group_backend=backend,
                sharding_strategy=self.options.get("sharding", "FULL_SHARD"),
                state_dict_type="sharded" if sharded_checkpoint else "full",
            )
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
        torch.manual_seed(0)  # adapters start at random
        if self.options.get("lora"):
            kwargs["lora"] = LoraOptions(rank=4)
        kwargs["train_embeddings"] = not self.options.get("frozen")
        module = (Compiled if self.options.get("compile") else CausalLM)(self.options["model"], **kwargs)
        module.optimizer = Mixing if self.options.get("mixing") else lambda p: torch.optim.AdamW(p, lr=1e-3)
        return module

    def data(self) -> TextDataModule:
        batch_size = self.options.get("batch_size", 4)
        return TextDataModule("python-docs", sequence_length=64, batch_size=batch_size, max_eval_windows=16)

    def pruner(self, **kwargs: Any) -> Observed:
        return Observed(**{**self.options.get("pruner", {}), **kwargs})


class FSDP1OnAnyDevice(FSDPStrategy):
    """FSDPStrategy, also on CPUs: Lightning refuses the class itself there, and names no device to torch."""

    def _setup_model(self, model: Any) -> Any:
        device = self.root_device

        class OnDevice(FullyShardedDataParallel):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "device_id": device})

        with mock.patch("torch.distributed.fsdp.FullyShardedDataParallel", OnDevice):
            return super()._setup_model(model)


class Mixing(torch.optim.SGD):
    """Adds the mean gradient of each row to every entry of the row. Masked gradients alone then keep no zero."""

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
    """Every decoder block is compiled and checkpoints its activations."""

    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.model.model.layers:
            layer.compile(backend="eager")
            layer.gradient_checkpointing = True


class Observed(SparseLLMCallback):
    """Notes what each rank sent while it pruned, and, under DDP, the weights with which each rank ended.

    Attributes:
        elements: number of elements that this rank sent.
        largest: number of elements of the largest tensor that this rank gathered.
        weights: of this rank, projections and norms by name. Empty with other strategies.
    """

    elements = 0
    largest = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self._watching_traffic():
            super().on_train_start(trainer, pl_module)
        self.weights: dict[str, Tensor] = {}
        if trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy):
            model = self._model(pl_module)
            self.weights = {p.name: p.parameter.detach().clone() for p in describe(model).projections()}
            self.weights |= {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}

    @contextmanager
    def _watching_traffic(self) -> Iterator[None]:
        gather, init = ProcessGroupRanks._gathered, ProcessGroupRanks.__init__
        made: list[ProcessGroupRanks] = []

        def watched_gather(ranks: ProcessGroupRanks, tensor: Tensor) -> Tensor:
            self.largest = max(self.largest, tensor.numel() * ranks.size)
            return gather(ranks, tensor)

        def watched_init(ranks: ProcessGroupRanks, *args: Any, **kwargs: Any) -> None:
            init(ranks, *args, **kwargs)
            made.append(ranks)

        patched = mock.patch.multiple(ProcessGroupRanks, _gathered=watched_gather, __init__=watched_init)
        with patched:
            yield
        self.elements = sum(ranks.elements for ranks in made)

    def observations(self) -> dict[str, Any]:
        return {"elements": self.elements, "largest": self.largest, "weights": self.weights}


def _wraps(names: tuple[str, ...], module: torch.nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP1's policy: whether a class has one of these names, or, of a container, that it is looked into."""
    return recurse or type(module).__name__.endswith(names)


def prune(job: Job) -> dict[str, Any]:
    """Prune and export to ``out``. Returns the observations of this rank."""
    pruner = job.pruner(export_dir=str(job.folder / "out"))
    job.trainer(pruner).fit(job.module(), job.data())
    return pruner.observations()


class Grows(pl.Callback):
    """On every rank: local zeros of projections stay zero from step to step.

    Attributes:
        shares: of zeros among the local entries, those that differ from the one before.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.shares: list[float] = []
        self.before: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        zeros = {name: local_tensor(p) == 0 for name, p in pl_module.named_parameters() if "proj" in name}
        for name, before in self.before.items():
            assert bool((zeros[name] | ~before).all()), f"{name} at step {trainer.global_step}"
        self.before = zeros
        flat = torch.cat([tensor.flatten() for tensor in zeros.values()])
        share = round(float(flat.double().mean()), 2)
        self.shares += [share] if self.shares[-1:] != [share] else []


def prune_gradually(job: Job) -> list[float]:
    """Prune by a schedule in four steps, and export to ``out``. Returns the shares of this rank's zeros, one for each stage."""
    grows = Grows()
    pruner = job.pruner(finetune=True, export_dir=str(job.folder / "out"))
    job.trainer(pruner, grows, max_steps=4).fit(job.module(), job.data())
    return grows.shares


def evaluate(job: Job) -> float:
    """Perplexity of the test windows, whose number the ranks need not divide."""
    data = job.data()
    data.max_eval_windows = job.options["windows"]
    return float(job.trainer().test(job.module(), data, verbose=False)[0]["test_perplexity"])


def prune_from_train_loader(job: Job) -> None:
    """Prune without a datamodule: Lightning shards the training dataloader, which gives the windows, over the ranks."""
    data = job.data()
    data.tokenizer = job.options["model"]
    windows = torch.cat([batch["input_ids"] for batch in data.calibration_dataloader(num_samples=24)])
    job.trainer(job.pruner(export_dir=str(job.folder / "out"))).fit(
        job.module(), torch.utils.data.DataLoader([{"input_ids": row} for row in windows], batch_size=4)
    )


def prune_on_accelerator(job: Job) -> dict[str, Tensor]:
    """Prune a random tiny model that lies on the device of ``support.accelerator``. Returns this rank's weights.

    The adapter is that of DDP. Lightning's DDP itself cannot run there, because torch's reducer reads the memory of tensors.
    """
    from sparsellm_lightning import PruningConfig, prune_model
    from sparsellm_lightning.distributed import StrategyAdapter
    from support.accelerator import DEVICE, accelerator, collectives_on_the_device, moved
    from support.batches import random_batches
    from support.models import build_model

    with accelerator(), collectives_on_the_device():
        model = moved(build_model(job.options["model"]))
        adapter = StrategyAdapter(ranks=ProcessGroupRanks(device=DEVICE)) if job.processes > 1 else StrategyAdapter()
        config = PruningConfig(**job.options["pruner"])
        prune_model(model, random_batches(), config, adapter=adapter, resume_dir=job.folder / "journal")
        solved: list[int] = []
        again = moved(build_model(job.options["model"]))
        prune_model(
            again,
            random_batches(),
            config,
            adapter=adapter,
            resume_dir=job.folder / "journal",
            on_iteration=lambda block, *_: solved.append(block),
        )
        assert not solved, "every block is restored from the journal"
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def resume(job: Job) -> tuple[list[int], bool]:
    """Prune, lose the second rank's file of block 1, and prune again. Returns the blocks solved then; whether weights agree."""
    from sparsellm_lightning import PruningConfig, prune_model
    from sparsellm_lightning.distributed import StrategyAdapter
    from support.batches import random_batches
    from support.models import build_model

    adapter, solved = StrategyAdapter(ranks=ProcessGroupRanks()), set()
    config, journal = PruningConfig(**job.options["pruner"]), job.folder / "journal"
    first, again = build_model("llama"), build_model("llama")
    prune_model(first, random_batches(), config, adapter=adapter, resume_dir=journal)
    if adapter.ranks.rank == 1:
        next(journal.glob("block-00001-rank-1.*")).unlink()
    prune_model(
        again,
        random_batches(),
        config,
        adapter=adapter,
        resume_dir=journal,
        on_iteration=lambda block, *_: solved.add(block),
    )
    return sorted(solved), all(torch.equal(a, b) for a, b in zip(again.parameters(), first.parameters(), strict=True))


def fit_on_accelerator(job: Job) -> None:
    """Prune on the device of ``support.accelerator`` in a Trainer, fine-tune with a dense teacher, export to ``out``."""
    from support.accelerator import Accelerator, accelerator, collectives_on_the_device

    with accelerator(), collectives_on_the_device():
        job.options["accelerator"] = Accelerator()
        pruner = job.pruner(finetune=True, export_dir=str(job.folder / "out"), resume_dir=str(job.folder / "journal"))
        job.trainer(pruner, Distillation(job.options["model"]), max_steps=2).fit(job.module(), job.data())


class Generates(pl.Callback):
    """Draws calibration windows twice: one window, then seven. A draw must not depend on its length."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaders = [trainer.datamodule.calibration_dataloader(count, seed=1) for count in (1, 7)]
        self.draws = [torch.cat([batch["input_ids"] for batch in loader]) for loader in loaders]
        trainer.should_stop = True


def generate(job: Job) -> list[Tensor]:
    """Returns the windows that this rank got from the datamodule of source ``self``."""
    data = TextDataModule("self", sequence_length=32, batch_size=3)
    generates = Generates()
    job.trainer(generates).fit(job.module(), data)
    return generates.draws


class ZerosHeld(pl.Callback):
    """On every rank: the local zeros are the same after every step, and the local kept weights move."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.local(pl_module).items()}
        assert self.before

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        now = {name: local_tensor(p) for name, p in pl_module.named_parameters()}
        for name, before in self.before.items():
            tensor = now[name]
            assert torch.equal(tensor == 0, before == 0), f"{name} at step {trainer.global_step}"
            if "base_layer" not in name:
                assert before.numel() == 0 or bool((tensor != before).any()), f"{name} stands still"

    @staticmethod
    def local(module: pl.LightningModule) -> dict[str, Tensor]:
        named = {
            name: local_tensor(p) for name, p in module.named_parameters() if "proj" in name and "lora" not in name
        }
        return {name: tensor for name, tensor in named.items() if bool((tensor == 0).any())}


def life(job: Job) -> None:
    """Prune, train, save, resume, export. Beside it: a run without a stop, and a new run from the sparse weights."""
    watch = ZerosHeld()
    taught = [Distillation(job.options["model"])] if job.options.get("distilled") else []

    def pruner(out: str | None = None) -> SparseLLMCallback:
        return job.pruner(finetune=True, export_dir=out and str(job.folder / out))

    job.trainer(pruner("unstopped"), watch, *taught, max_steps=4).fit(job.module(), job.data())
    first = job.trainer(pruner(), watch, *taught, max_steps=2)
    first.fit(job.module(), job.data())
    checkpoint = str(job.folder / "stopped.ckpt")
    first.save_checkpoint(checkpoint)
    # No run from here on may prune.
    with mock.patch("sparsellm_lightning.callbacks.reports.prune_model", side_effect=AssertionError("pruned again")):
        job.trainer(pruner("out"), watch, *taught, max_steps=4).fit(job.module(), job.data(), ckpt_path=checkpoint)
        if not job.options.get("lora"):
            new = job.trainer(SparseFinetuning(), watch, max_steps=1)
            new.fit(job.module(weights=checkpoint), job.data())
            assert new.global_step == 1


def train_sparse(job: Job) -> None:
    """Train a sparse model with its zeros held."""
    fit = job.trainer(SparseFinetuning(), ZerosHeld(), max_steps=2)
    fit.fit(job.module(weights=job.options["model"]), job.data())
    assert fit.global_step == 2


def hold_zeros(job: Job) -> None:
    """Train a sparse model that torch's DDP wraps, in a plain loop. Each rank has a window of its own."""
    model = AutoModelForCausalLM.from_pretrained(job.options["model"])
    zeros = {name: p == 0 for name, p in model.named_parameters() if "proj" in name}
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    ids = torch.randint(0, 400, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    with holding_zeros(wrapped):  # type: ignore[arg-type]
        for _ in range(2):
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ranks = ProcessGroupRanks()
    for name, pruned in zeros.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight == 0, pruned), name
        assert not bool(optimizer.state[weight]["exp_avg"][pruned].any()), name
        assert all(torch.equal(other, weight.detach()) for other in ranks.gather(weight.detach())), name


def fail(job: Job) -> None:
    """Prune, but one rank ends in the solve of block 1, in the way that ``failure`` names."""
    from sparsellm_lightning.pipeline import sequential

    ends: dict[str, Callable[[], Any]] = {
        "ValueError": lambda: _raise(ValueError("a bad batch")),
        "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
        "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    }
    solve = sequential.solve_feed_forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        here = torch.distributed.get_rank() == job.options["failing_rank"]
        if here and kwargs["name"].startswith("model.layers.1"):
            (job.folder / "failed").touch()
            ends[job.options["failure"]]()
        return solve(*args, **kwargs)

    with mock.patch.object(sequential, "solve_feed_forward", failing):
        prune(job)


def _raise(error: BaseException) -> None:
    raise error


class ReadingRows(pl.Callback):
    """Reads an expert's rows, writes zeros, and looks at what was read."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        adapter = adapter_for(trainer)
        p = next(p for p in adapter.describe(pl_module.model).projections() if p.expert is not None)
        read = [adapter.read_rows(p), adapter.whole(p)]
        before = [tensor.clone() for tensor in read]
        adapter.write_rows(p, torch.zeros_like(read[0]))
        self.copies = all(torch.equal(one, other) for one, other in zip(read, before, strict=True))
        trainer.should_stop = True


def reading(job: Job) -> bool:
    """Whether rows that are read stay as they are when the parameter changes."""
    rows = ReadingRows()
    job.trainer(rows).fit(job.module(), job.data())
    return rows.copies


def wait_for_first(job: Job) -> tuple[bool, str]:
    """Whether the others find, without a collective, what the first rank has written; and what they say if it fails."""

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def run(broadcast: Callable[[Any], Any]) -> Any:
        first = dist.get_rank() == 0
        return SimpleNamespace(world_size=2, is_global_zero=first, strategy=SimpleNamespace(broadcast=broadcast))

    written, said = job.folder / "written", ""
    with failing_with_first(run(lambda value: value)):
        if dist.get_rank() == 0:
            time.sleep(0.5)
            written.touch()
    found = written.exists()
    try:
        with failing_with_first(run(broadcast)):
            if dist.get_rank() == 0:
                raise UserError("no room")
    except UserError as error:
        said = str(error)
    return found, said


def refusals_of_fsdp2(job: Job) -> list[str]:
    """What the adapter says of other shards, of blocks that are gathered early, and of those not sharded as a whole."""
    mesh = init_device_mesh("cpu", (job.processes,))
    meshes = {"tensor_parallel": SimpleNamespace(size=lambda: 1), "data_parallel": mesh}
    said = []
    for kind in ("dimension 1", "elsewhere", "prefetched", "not", "in parts", "but for a parameter"):
        model = AutoModelForCausalLM.from_pretrained(job.options["model"])
        layers = [] if kind == "not" else model.model.layers
        units = [layer.self_attn for layer in layers] if kind == "in parts" else layers
        placed = (lambda p: Shard(p.dim() - 1)) if kind == "dimension 1" else None
        for unit in units:
            ignored = {unit.mlp.up_proj.weight} if kind == "but for a parameter" else None
            fully_shard(unit, mesh=mesh, shard_placement_fn=placed, ignored_params=ignored)
        layout = describe(model)
        for unit in units:
            unit.reshard()  # a forward has found the blocks
        if kind == "prefetched":
            model.model.layers[0].set_modules_to_forward_prefetch([model.model.layers[1]])
        adapter: Any = FSDP2Adapter(SimpleNamespace(device_mesh=meshes, root_device=torch.device("cpu")))  # type: ignore[arg-type]
        adapter.ranks.device = torch.device("meta" if kind == "elsewhere" else "cpu")
        try:
            adapter.check(layout)
        except UserError as error:
            said.append(str(error))
    model = AutoModelForCausalLM.from_pretrained(job.options["model"], dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.scale = torch.nn.Parameter(torch.ones(3))
    try:
        shard_blocks(model, mesh)
    except UserError as error:
        said.append(str(error))
    return said


class FirstMeasures(pl.Callback):
    """The first rank measures a perplexity alone."""

    found: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.found = perplexity(pl_module.model, [{"input_ids": torch.arange(64).view(2, 32)}])
        trainer.should_stop = True


def measure_alone(job: Job) -> float | None:
    """Returns what this rank has measured."""
    first = FirstMeasures()
    job.trainer(first).fit(job.module(), job.data())
    return first.found


class Backward(pl.Callback):
    """A backward in which ranks use different experts. Compares its gradients with those of the plain model."""

    used: list[str]
    error: float

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        adapter, model = adapter_for(trainer), pl_module.model
        windows = [torch.full((1, 2), token) for token in (3, 400)]  # by rank
        self.used = []
        for name, module in model.named_modules():
            if type(module).__name__ == "Expert":
                module.register_forward_hook(lambda *_, name=name: self.used.append(name))
        with adapter.tuning(decoder_blocks(model)):
            model(windows[trainer.global_rank], use_cache=False).logits.square().sum().backward()
        plain = AutoModelForCausalLM.from_pretrained(pl_module.pretrained)
        for ids in windows:
            (plain(ids, use_cache=False).logits.square().sum() / 2).backward()  # FSDP2 takes the mean
        errors = []
        for (name, parameter), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
            if "experts" in name:
                expected = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
                errors.append(float((parameter.grad.full_tensor() - expected).norm() / (expected.norm() + 1)))
        self.error = max(errors)
        model.zero_grad()
        trainer.should_stop = True


def unused_experts(job: Job) -> tuple[list[str], float]:
    """Returns the experts that this rank has used, and the largest error of a gradient."""
    backward = Backward()
    job.trainer(backward).fit(job.module(), job.data())
    return backward.used, backward.error


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, description = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    run(description["job"], where, description)
