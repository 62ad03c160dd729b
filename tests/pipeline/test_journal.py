"""A run that is killed and started again ends with the weights of a run that was not killed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import VOCABULARY, build_model
from support.runs import assert_same_weights, calibration_batches, make_context, state_of, tune_with
from support.training import trainer
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm_lightning import CausalLM, PruningConfig, SparseLLMCallback, TextDataModule, UserError, prune_model
from sparsellm_lightning.allocation import shrinkage
from sparsellm_lightning.distributed import ProcessGroupRanks
from sparsellm_lightning.pipeline import sequential
from sparsellm_lightning.pipeline.distil import Distiller
from sparsellm_lightning.pipeline.resume import Journal
from sparsellm_lightning.pipeline.sequential import prune_blocks
from sparsellm_lightning.reporting import BlockResult, PruningReport
from sparsellm_lightning.runtime import claimed
from sparsellm_lightning.solvers import Ranks

CONFIG = PruningConfig(preset="paper", sparsity=0.7, num_iterations=2, num_calibration_samples=8)
COARSE_DTYPE = "sparsellm_lightning.calibration.context.coarse_dtype"

Event = tuple[int, int, float]  # block, iteration, error


class Killed(Exception):
    pass


def prune(
    model: PreTrainedModel, batches: Any, folder: Path | None, config: PruningConfig = CONFIG, stop: int | None = None
) -> tuple[PruningReport, list[Event]]:
    """The report of a run, and its calls of ``on_iteration``.

    Args:
        model: pruned in place.
        batches: calibration windows.
        folder: of the journal. None: no journal.
        config: settings.
        stop: number of calls after which the next call raises :class:`Killed`.
    """
    events: list[Event] = []

    def on_iteration(block: int, iteration: int, error: float) -> None:
        if len(events) == stop:
            raise Killed
        events.append((block, iteration, error))

    return prune_model(model, batches, config, resume_dir=folder, on_iteration=on_iteration), events


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target": "model", "ignore": ("up_proj",)}),
        ("opt", {"pattern": "2:4", "sparsity": None}),
        ("gpt2", {"alternation_blocks": [1]}),
        ("llama", {"reconstruction_steps": 4, "target": "model", "ignore": ("*.1.*",)}),
        ("opt-350m", {"reconstruction_steps": 4}),
        ("gpt2", {"reconstruction_steps": 4, "method": "sparsegpt", "allocation": "kl"}),
        ("llama", {"pattern": "neurons", "sparsity": 0.5, "round_to": 16}),
        ("gemma3", {"pattern": {"parameters": 0.6}, "sparsity": None, "round_to": 16}),
    ],
)
def test_stopped_anywhere(tmp_path: Path, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tune_with(monkeypatch, learning_rate=2e-3, batch_tokens=64)
    config, batches = replace(CONFIG, **settings), random_batches()
    whole = build_model(name)
    report, events = prune(whole, batches, None, config)
    if config.reconstruction_steps:
        dense = state_of(build_model(name))
        changed = [key for key, tensor in whole.state_dict().items() if not torch.equal(tensor, dense[key])]
        assert any("norm" in key or "ln_" in key for key in changed), "reconstruction changes more than projections"
    assert events
    for stop in sorted({0, len(events) // 2, len(events) - 1}):
        folder = tmp_path / str(stop)
        with pytest.raises(Killed):
            prune(build_model(name), batches, folder, config, stop)
        again = build_model(name)
        resumed, after = prune(again, batches, folder, config)
        assert_same_weights(again, whole)
        assert after == [event for event in events if event[0] >= events[stop][0]], (
            "finished blocks are not solved again"
        )
        for key in ("errors", "held_out_errors", "reconstruction"):
            assert [b[key] for b in resumed.blocks] == [b[key] for b in report.blocks]
        assert [layer["error"] for layer in resumed.layers] == [layer["error"] for layer in report.layers]
    finished = build_model(name)
    assert prune(finished, batches, tmp_path / "0", config)[1] == []
    assert_same_weights(finished, whole)


def test_a_resumed_run_reports_the_seconds_of_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of the home folder, which ``~`` stands for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    report, _ = prune(build_model("llama"), random_batches(), Path("~/journal"))
    assert (tmp_path / "journal").is_dir()
    assert "restored" not in report.phases
    again, _ = prune(build_model("llama"), random_batches(), Path("~/journal"))
    taken = sum(block["seconds"] for block in report.blocks)
    assert again.phases["restored"] == pytest.approx(taken)
    assert again.wall_seconds > taken


def test_a_resumed_run_keeps_the_seconds_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of latency: what leaves is chosen from the first run's seconds."""
    config, batches = replace(CONFIG, pattern={"latency": 0.6}, sparsity=None, round_to=16), random_batches()

    def run(units: float, heads: float, rest: float, folder: Path | None = None, stop: int | None = None) -> Any:
        costs = [shrinkage.Cost(units, heads, rest)] * 3
        monkeypatch.setattr(shrinkage, "_seconds", lambda *_: costs)
        model = build_model("llama")
        prune(model, batches, folder, config, stop)
        return model

    whole = run(8.0, 1.0, 1.0)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(whole.parameters(), run(1.0, 1.0, 8.0).parameters(), strict=True)
    )
    with pytest.raises(Killed):
        run(8.0, 1.0, 1.0, tmp_path, stop=1)
    assert_same_weights(run(1.0, 1.0, 8.0, tmp_path), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 4])
def test_blocks_are_restored_bit_equal(
    tmp_path: Path, steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of a plain run (no steps) and of a reconstructed one: all parameters, and the result."""
    tune_with(monkeypatch, learning_rate=2e-3, batch_tokens=64)
    config, batches = replace(CONFIG, reconstruction_steps=steps), calibration_batches(random_batches())
    pruned, dense = build_model("gpt2").to(dtype), build_model("gpt2").to(dtype)
    context = make_context(pruned, config)
    results = list(prune_blocks(context, batches, 7, Journal(tmp_path, context, batches)))
    assert all(bool(result.reconstruction) == bool(steps) for result in results)
    context = make_context(dense, config)
    journal = Journal(tmp_path, context, batches)
    for block, pruned_block, result in zip(context.layout.blocks, pruned.transformer.h, results, strict=True):
        assert not torch.equal(block.module.mlp.c_fc.weight, pruned_block.mlp.c_fc.weight)
        with torch.no_grad():
            assert journal.restore(block) == result
        assert_same_weights(block.module, pruned_block)
        norms = torch.equal(
            pruned_block.ln_1.weight, build_model("gpt2").to(dtype).transformer.h[block.index].ln_1.weight
        )
        assert norms == (not steps)


def test_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = random_batches()
    prune(build_model("llama"), batches, tmp_path)
    with pytest.raises(UserError, match=r"config\.sparsity: 0\.7 there, 0\.6 here\. Choose"):
        prune(build_model("llama"), batches, tmp_path, replace(CONFIG, sparsity=0.6))
    with pytest.raises(UserError, match=r"config\.reconstruction_steps: 0 there, 4 here"):
        prune(build_model("llama"), batches, tmp_path, replace(CONFIG, reconstruction_steps=4))
    with pytest.raises(UserError, match=r"differ: the calibration windows \(text, tokenizer or seed\)\. Choose"):
        prune(build_model("llama"), batches[1:], tmp_path)
    other = build_model("llama")
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(UserError, match=r"differ: the model's weights\. Choose"):
        prune(other, batches, tmp_path)
    other = build_model("llama")
    other.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"arithmetic\.attention: sdpa there, eager here"):
        prune(other, batches, tmp_path)
    prune(build_model("llama"), batches, tmp_path, replace(CONFIG, memory=2**30))
    with pytest.raises(
        UserError, match=r"config\.distillation_steps: False there, True here"
    ):  # so windows are held out
        prune(build_model("llama"), batches, tmp_path, replace(CONFIG, distillation_steps=4))
    monkeypatch.setattr("sparsellm_lightning.pipeline.resume.versions", lambda: {"torch": "0"})
    with pytest.raises(UserError, match=r"versions\.torch: .* there, 0 here"):
        prune(build_model("llama"), batches, tmp_path)


def test_a_run_without_room_for_distillation_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its message says. The finished blocks are those of a run that does not distil."""
    config = replace(CONFIG, reconstruction_steps=2, distillation_steps=4)
    without = replace(config, distillation_steps=0)
    expected, model = build_model("llama"), build_model("llama")
    prune(expected, random_batches(), None, without)

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "tune", no_room)
        with pytest.raises(UserError, match="Set distillation_steps to 0"):
            prune(model, random_batches(), tmp_path, config)
    model = build_model("llama")
    _, events = prune(model, random_batches(), tmp_path, without)
    assert events == []
    assert_same_weights(model, expected)


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("rope_parameters", {"rope_theta": 5e5})]
)
def test_another_model_config_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    """The weights are the same, the model is not."""
    prune(build_model("llama"), random_batches(), tmp_path)
    other = build_model("llama")
    old = getattr(other.config, key)
    setattr(other.config, key, {**old, **value} if isinstance(value, dict) else value)
    with pytest.raises(UserError, match=rf"model\.config\.{key}"):
        prune(other, random_batches(), tmp_path)


def test_permuted_weights_are_refused(tmp_path: Path) -> None:
    prune(build_model("llama"), random_batches(), tmp_path)
    other = build_model("llama")
    weight = other.model.layers[1].mlp.up_proj.weight.data
    weight[[3, 77]] = weight[[77, 3]]
    with pytest.raises(UserError, match="differ: the model's weights"):
        prune(other, random_batches(), tmp_path)


def test_another_precision_of_the_trainer_is_refused(tmp_path: Path, model_dir: Path) -> None:
    def fit(precision: Any) -> None:
        pruner = SparseLLMCallback(preset="paper", method="wanda", resume_dir=str(tmp_path), num_calibration_samples=4)
        data = TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4)
        trainer(pruner, precision=precision).fit(CausalLM(str(model_dir)), data)

    fit("32-true")
    with pytest.raises(UserError, match=r"arithmetic\.precision: 32-true there, bf16-mixed here"):
        fit("bf16-mixed")
    fit("32-true")


def test_a_later_stage_begins_anew_behind_other_training(tmp_path: Path) -> None:
    """The weights in front of a later stage come from training, which may not repeat bit by bit."""

    def stage(model: PreTrainedModel) -> None:
        prune_model(model, random_batches(), CONFIG, keep_zeros=True, resume_dir=tmp_path)

    stage(build_model("llama"))
    first = sorted(tmp_path.glob("block-*"))
    other, expected = (build_model("llama", seed=1) for _ in range(2))
    with pytest.warns(UserWarning, match="other trained weights. It is begun anew"):
        stage(other)
    prune_model(expected, random_batches(), CONFIG, keep_zeros=True)
    assert_same_weights(other, expected)
    assert len(list(tmp_path.glob("block-*"))) == len(first) == 3
    assert sorted(tmp_path.glob("block-*")) != first
    stage(build_model("llama", seed=1))
    with pytest.raises(UserError, match=r"config\.sparsity"):
        prune_model(
            build_model("llama"), random_batches(), replace(CONFIG, sparsity=0.8), keep_zeros=True, resume_dir=tmp_path
        )


@pytest.mark.parametrize("content", [b"", b'{"config": {"spars', b"\xff\xfe", b"[]", b"3"])
def test_a_damaged_fingerprint(tmp_path: Path, content: bytes) -> None:
    prune(build_model("llama"), random_batches(), tmp_path)
    (tmp_path / "fingerprint.json").write_bytes(content)
    with pytest.raises(UserError, match="resume_dir"):
        prune(build_model("llama"), random_batches(), tmp_path)


def test_a_journal_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = build_model("llama")
    before = state_of(model)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/journal")):
        with pytest.raises(UserError, match="resume_dir must be writable"):
            prune(model, random_batches(), folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that were written stay usable, and nothing half-written is left."""
    batches, whole, calls = random_batches(), build_model("llama"), 0
    _, events = prune(whole, batches, None)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # a trial, the fingerprint, the first block
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"block-00001-rank-0.*No space left on device.*start the same command again"):
        prune(build_model("llama"), batches, tmp_path)
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names == {"fingerprint", "block-00000-rank-0"}
    again = build_model("llama")
    assert prune(again, batches, tmp_path)[1] == [event for event in events if event[0] > 0]
    assert_same_weights(again, whole)


def test_other_arithmetic_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with matrix units for bfloat16 does not go on with the run of a machine without them."""
    monkeypatch.setattr(COARSE_DTYPE, lambda device, exact: torch.float32)
    with pytest.raises(Killed):
        prune(build_model("llama"), random_batches(), tmp_path, stop=3)
    monkeypatch.setattr(COARSE_DTYPE, lambda device, exact: torch.bfloat16)
    message = r"arithmetic\.coarse_dtype: torch\.float32 there, torch\.bfloat16 here"
    with pytest.raises(UserError, match=message):
        prune(build_model("llama"), random_batches(), tmp_path)
    monkeypatch.setattr(COARSE_DTYPE, lambda device, exact: torch.float32)
    prune(build_model("llama"), random_batches(), tmp_path)


def test_damaged_and_half_written_files(tmp_path: Path) -> None:
    """A file with a changed byte, a file that was not renamed, and a file of other content whose name holds its SHA-256."""
    batches, whole = random_batches(), build_model("llama")
    _, events = prune(whole, batches, tmp_path)
    first, second, third = sorted(tmp_path.glob("block-*"))
    damaged = bytearray(second.read_bytes())
    damaged[-3] ^= 1
    second.write_bytes(damaged)
    third.unlink()
    (tmp_path / f".{third.name}.partial").write_bytes(b"half")
    again = build_model("llama")
    with pytest.warns(UserWarning, match="damaged"):
        assert prune(again, batches, tmp_path)[1] == [event for event in events if event[0] > 0]
    assert_same_weights(again, whole)
    assert first.exists()

    stem = first.name.split(".")[0]
    first.unlink()
    nonsense = b"nonsense"
    (tmp_path / f"{stem}.{hashlib.sha256(nonsense).hexdigest()}.safetensors").write_bytes(nonsense)
    again = build_model("llama")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert prune(again, batches, tmp_path)[1] == [event for event in events if event[0] == 0]
    assert_same_weights(again, whole)


def test_written_windows_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that would write other windows goes on with those of the machine that began the run."""
    ids = torch.randint(0, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(1))
    config, batches = replace(CONFIG, continuations=1, num_calibration_samples=16), ids.split(4)
    whole = build_model("llama")
    prune(whole, batches, None, config)
    with pytest.raises(Killed):
        prune(build_model("llama"), batches, tmp_path, config, 3)
    monkeypatch.setattr("sparsellm_lightning.pipeline.prune.rewrite_windows", lambda model, ids, *_, **__: ids.flip(1))
    again = build_model("llama")
    report, _ = prune(again, batches, tmp_path, config)
    assert_same_weights(again, whole)
    assert report.calibration["written"] == 14
    (file,) = tmp_path.glob("written-windows-*")
    file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"damaged\. written-windows-0 is done again"):
        prune(build_model("llama"), batches, tmp_path, config)
    assert len(list(tmp_path.glob("written-windows-*"))) == 1
    assert list(tmp_path.glob("written-windows-*")) != [file], "the new windows are noted"


@pytest.mark.parametrize("lacks", ["a block", "the allocation"])
def test_files_of_two_solves_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """Blocks that another rank lacks, or that were solved with an allocation that is gone, are solved again."""
    context = make_context(build_model("llama"), CONFIG)
    journal = Journal(tmp_path, context, calibration_batches(random_batches()))
    journal.remember("allocation", lambda: torch.ones(1))
    for block in context.layout.blocks:
        journal.write(block, BlockResult(block.index))
    if lacks == "a block":
        with monkeypatch.context() as patch:
            patch.setattr(Ranks, "all", lambda self, condition: False)
            assert journal.restore(context.layout.blocks[0]) is None
        assert len(list(tmp_path.glob("block-*"))) == len(context.layout.blocks) - 1
    else:
        (file,) = tmp_path.glob("allocation-*")
        file.write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="allocation is done again"):
            journal.remember("allocation", lambda: torch.zeros(1))
        assert not list(tmp_path.glob("block-*"))
        assert len(list(tmp_path.glob("allocation-*"))) == 1


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with claimed(tmp_path / "journal", "resume_dir"), pytest.raises(UserError, match="being written by another run"):
        prune(build_model("llama"), random_batches(), tmp_path / "journal")
    prune(build_model("llama"), random_batches(), tmp_path / "journal")


class OnMeta(Ranks):
    """The first of two ranks that exchange tensors on the device ``meta``. The second rank sends ones."""

    rank, size, device = 0, 2, torch.device("meta")

    def __init__(self) -> None:
        self.gathered = 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        assert tensor.device == self.device
        self.gathered += 1
        return [torch.ones(tensor.shape, dtype=tensor.dtype)] * 2


def test_journal_sends_tensors_on_the_ranks_device(tmp_path: Path) -> None:
    """NCCL refuses tensors on the CPU."""
    model, batches, ranks = build_model("llama"), calibration_batches(random_batches()), OnMeta()
    context = make_context(model, CONFIG, ranks)
    journal = Journal(tmp_path, context, batches)
    compared = ranks.gathered
    assert compared > 0
    block, result = context.layout.blocks[1], BlockResult(1, errors=[0.5])
    journal.write(block, result)
    written = state_of(block.module)
    with torch.no_grad():
        for parameter in block.module.parameters():
            parameter.zero_()
        assert asdict(journal.restore(block)) == asdict(result)
    assert ranks.gathered > compared
    assert all(torch.equal(tensor, written[key]) for key, tensor in block.module.state_dict().items())
    assert journal.remember("windows", lambda: torch.arange(3)).tolist() == [0, 1, 2]


def test_process_groups_send_counts_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = object.__new__(ProcessGroupRanks)
    ranks.rank, ranks.size, ranks.group, ranks.device, ranks.elements = 0, 2, None, torch.device("meta"), 0

    def all_gather(parts: list[Tensor], tensor: Tensor, group: Any) -> None:
        assert {part.device for part in (*parts, tensor)} == {ranks.device}
        assert {(part.shape, part.dtype) for part in (*parts, tensor)} == {((2,), torch.int64)}

    gather = ranks.gather

    def filled(tensor: Tensor) -> list[Tensor]:  # a tensor on the device meta holds no numbers
        assert len(gather(tensor)) == 2
        return [torch.tensor([1, 2]), torch.tensor([30, 40])]

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(ranks, "gather", filled)
    assert ranks.gather_counts(1, 2) == [[1, 2], [30, 40]]
    assert ranks.total(1, 2) == [31, 42]
    assert ranks.elements == 8


def test_an_allocation_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, method="sparsegpt", allocation="kl_blocks")
    measured, restored = build_model("llama"), build_model("llama")
    prune_model(measured, random_batches(), config, resume_dir=tmp_path)
    for path in tmp_path.glob("block-*"):
        path.unlink()
    monkeypatch.setattr(sequential, "allocate", lambda *_: pytest.fail("it is measured again"))
    prune_model(restored, random_batches(), config, resume_dir=tmp_path)
    assert_same_weights(measured, restored)
