"""Exports: tried at the start, written as one, and nothing lost that no export wrote."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.models import CONFIGS, build_model
from support.training import OwnModule, trainer
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsellm_lightning import SparseLLMCallback, UserError, export_model, load_model
from sparsellm_lightning.models import (
    REPORT_NAME,
    add_to_report,
    check_companions,
    check_export_dir,
    check_rebuildable,
    export_or_rescue,
    plain_class,
    recover_export,
)
from sparsellm_lightning.models import export as export_module
from sparsellm_lightning.runtime import claimed


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model("llama")


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_the_report_names_every_file(model: PreTrainedModel, tmp_path: Path) -> None:
    def more(folder: Path) -> None:
        (folder / "plot.png").write_bytes(b"0")

    folder = export_model(model, tmp_path / "out", report=lambda: {"sparsity": 0.5}, more=more)
    report = json.loads((folder / REPORT_NAME).read_text())
    assert report["sparsity"] == 0.5
    assert set(report["files"]) == names(folder) >= {"plot.png", "config.json", "model.safetensors", REPORT_NAME}
    assert names(tmp_path) == {"out"}, "nothing is left beside the export"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_an_earlier_export_is_replaced(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model, tmp_path / "out", report=lambda: {"run": 1}, more=lambda folder: (folder / "old.png").touch())
    with pytest.raises(UserError, match="must be empty"):
        export_model(model, tmp_path / "out")
    export_model(model, tmp_path / "out", overwrite=True, report=lambda: {"run": 2})
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text())["run"] == 2
    assert "old.png" not in names(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_licence_and_processor_come_along(model: PreTrainedModel, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    model.save_pretrained(source)
    (source / "LICENSE.txt").write_text("do what you like")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "notes.txt").write_text("mine")
    export_model(load_model(source), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "do what you like"
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_an_earlier_export_is_put_back(model: PreTrainedModel, tmp_path: Path) -> None:
    """The run that replaced it was killed when it had moved it away, and had not yet moved its own there."""
    aside = tmp_path / ".out.0123abcd.old"
    aside.mkdir()
    export_model(model, aside / "out")
    for _ in range(2):
        recover_export(tmp_path / "out")
        assert names(tmp_path) == {"out"}
        assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("foreign", ["notes.txt", "data"])
def test_files_that_no_export_wrote_are_not_deleted(model: PreTrainedModel, tmp_path: Path, foreign: str) -> None:
    folder = export_model(model, tmp_path / "out")
    (folder / foreign).mkdir() if foreign == "data" else (folder / foreign).write_text("mine")
    with pytest.raises(UserError, match=f"files that no export wrote, such as {foreign}"):
        export_model(model, folder, overwrite=True)
    assert (folder / foreign).exists()
    assert (folder / "model.safetensors").exists()


def test_a_folder_without_a_report_is_not_replaced(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"such as thesis\.tex"):
        export_model(model, tmp_path / "work", overwrite=True)


@pytest.mark.parametrize("folder", [".", "..", "../..", "inside/.."])
def test_the_working_directory_and_its_parents_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    here = tmp_path / "a" / "b"
    (here / "inside").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="must not be the working directory or a folder above it"):
        check_export_dir(folder, overwrite=True)


def test_what_is_no_plain_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path, kind in (("file", "file"), ("link", "symbolic link")):
        with pytest.raises(UserError, match=f"must be a plain folder, got the {kind}"):
            check_export_dir(tmp_path / path, overwrite=True)
    with pytest.raises(UserError, match="got the mount point"):
        check_export_dir("/proc", overwrite=True)


@pytest.mark.parametrize("folder", ["file/out", "file/deeper/out"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="export_dir must be writable"):
        check_export_dir(tmp_path / folder, overwrite=False)
    with pytest.raises(UserError, match="export_dir must be writable"):
        check_export_dir("/proc/out", overwrite=False)


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    check_export_dir(tmp_path / "deep" / "out", overwrite=False)
    assert not (tmp_path / "deep" / "out").exists()
    assert not (tmp_path / "deep").exists() or not names(tmp_path / "deep")


@pytest.mark.parametrize("fails", ["more", "report"])
def test_an_export_that_fails_leaves_the_earlier_one(model: PreTrainedModel, tmp_path: Path, fails: str) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    export_model(model, tmp_path / "out", report=lambda: {"run": 1})
    before = names(tmp_path / "out")
    with pytest.raises(OSError, match="No space left"):
        export_model(model, tmp_path / "out", overwrite=True, **{fails: fail})
    assert names(tmp_path / "out") == before
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text())["run"] == 1
    assert names(tmp_path) == {"out"}


def test_an_export_that_cannot_be_put_in_place_leaves_the_earlier_one(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(model, tmp_path / "out", report=lambda: {"run": 1})
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        export_model(model, tmp_path / "out", overwrite=True, report=lambda: {"run": 2})
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text())["run"] == 1
    assert names(tmp_path) == {"out"}


def test_the_new_export_is_in_place_before_the_old_one_goes(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(model, tmp_path / "out", report=lambda: {"run": 1})
    seen = []
    original = export_module.shutil.rmtree

    def rmtree(path: Path, **kwargs: Any) -> None:
        if path.name.endswith(".old"):
            seen.append(json.loads((tmp_path / "out" / REPORT_NAME).read_text())["run"])
        original(path, **kwargs)

    monkeypatch.setattr(export_module.shutil, "rmtree", rmtree)
    export_model(model, tmp_path / "out", overwrite=True, report=lambda: {"run": 2})
    assert seen == [2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_report_that_is_not_finite_is_refused(model: PreTrainedModel, tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_model(model, tmp_path / "out", report=lambda: {"perplexity": value})
    assert not (tmp_path / "out").exists()


def test_a_generation_config_that_cannot_be_saved_is_refused_at_the_start(tmp_path: Path) -> None:
    model = build_model("llama")
    check_companions(model, None, tmp_path / "out")
    model.generation_config.temperature = 0.7
    pruner = SparseLLMCallback(preset="paper", method="magnitude", measure=False, export_dir=str(tmp_path / "out"))
    windows = torch.randint(0, 100, (4, 16))
    with pytest.raises(UserError, match="generation_config must be valid to be exported"):
        trainer(pruner).fit(OwnModule(model), DataLoader(windows, batch_size=2))  # type: ignore[arg-type]
    assert all(bool(p.all()) for name, p in model.named_parameters() if "proj" in name), "nothing was pruned"


class Unsaveable:
    """A tokenizer whose settings JSON does not know."""

    batch_decode = None

    def save_pretrained(self, folder: Path) -> None:
        json.dumps(torch.float32)


def test_a_tokenizer_or_configuration_that_cannot_be_saved(tmp_path: Path) -> None:
    """It is refused at the start, and what fails at the end all the same costs no weights."""
    model = build_model("llama")
    with pytest.raises(UserError, match="tokenizer must be valid to be exported: Object of type dtype"):
        check_companions(model, Unsaveable(), tmp_path / "out")  # type: ignore[arg-type]
    export = partial(export_model, model, tokenizer=Unsaveable())
    with pytest.raises(UserError, match=r"could not be written .* The model is in"):
        export_or_rescue(export, tmp_path / "out", overwrite=False)
    (rescued,) = tmp_path.iterdir()
    for tensor, expected in zip(load_model(rescued).parameters(), model.parameters(), strict=True):
        assert torch.equal(tensor, expected)
    model.config.own = torch.float32
    with pytest.raises(UserError, match="config must be valid to be exported"):
        check_companions(model, None, tmp_path / "out")


def test_models_that_cannot_be_built_anew_are_refused_at_the_start(tmp_path: Path) -> None:
    class Another(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig, more: int) -> None:
            super().__init__(config)

    check_rebuildable(build_model("llama"))
    with pytest.raises(UserError, match="Another cannot be made from its configuration alone"):
        check_rebuildable(Another(CONFIGS["llama"], 1))
    model = build_model("llama")
    model.value_head = torch.nn.Linear(4, 1)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")  # its names have another part
    pruner = SparseLLMCallback(preset="paper", method="magnitude", measure=False, export_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"other parameters, such as value_head\.bias"):
        trainer(pruner).fit(OwnModule(model), DataLoader(torch.randint(0, 100, (4, 16)), batch_size=2))  # type: ignore[arg-type]


def test_the_class_below_fsdp2() -> None:
    model, plain = build_model("llama"), LlamaForCausalLM
    model.__class__ = type("FSDPLlamaForCausalLM", (FSDPModule, plain), {})
    assert plain_class(model) is plain


def test_a_model_is_rescued_without_a_report_that_cannot_be_written(model: PreTrainedModel, tmp_path: Path) -> None:
    export = partial(export_model, model, report=lambda: {"perplexity": float("nan")})
    with pytest.raises(UserError, match=r"could not be written .*not JSON compliant.* The model is in"):
        export_or_rescue(export, tmp_path / "out", overwrite=False)
    (rescued,) = tmp_path.iterdir()
    for tensor, expected in zip(load_model(rescued).parameters(), model.parameters(), strict=True):
        assert torch.equal(tensor, expected)


def test_an_export_that_cannot_be_changed_keeps_its_report(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model, tmp_path / "out", report=lambda: {"run": 1})
    report = tmp_path / "out" / REPORT_NAME
    add_to_report(tmp_path / "out", speed=[])
    assert json.loads(report.read_text())["speed"] == []
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with (
        mock.patch.object(Path, "replace", side_effect=OSError("no space left")),
        pytest.warns(UserWarning, match="no space left"),
    ):
        add_to_report(tmp_path / "out", speed=[1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert json.loads(report.read_text())["speed"] == []
    report.write_text("{")
    with pytest.warns(UserWarning, match=rf"speed could not be added to .*{REPORT_NAME}"):
        add_to_report(tmp_path / "out", speed=[])


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "out", "export_dir"):
        with pytest.raises(UserError, match="is being written by another run"), claimed(tmp_path / "out", "export_dir"):
            pass
        with claimed(tmp_path / "other", "export_dir"):
            pass
    with claimed(tmp_path / "out", "export_dir"):
        pass
    assert not names(tmp_path), "no lock is left"


def test_compiled_blocks_are_exported_under_their_own_names(model: PreTrainedModel, tmp_path: Path) -> None:
    compiled = copy.deepcopy(model)
    for index, layer in enumerate(compiled.model.layers):
        compiled.model.layers[index] = torch.compile(layer, backend="eager")
    loaded = load_model(str(export_model(compiled, tmp_path / "out")))
    for (name, found), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_compiled_blocks_get_smaller(tmp_path: Path) -> None:
    model, ids = build_model("llama"), torch.arange(128).view(8, 16)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    pruner = SparseLLMCallback(
        preset="paper",
        method="magnitude",
        pattern="neurons",
        sparsity=0.5,
        round_to=16,
        export_dir=str(tmp_path / "out"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(pruner, max_steps=1).fit(OwnModule(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    with torch.no_grad():
        found, expected = (m.eval()(ids).logits for m in (load_model(str(tmp_path / "out")), model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export_model(build_model("llama"), "~/out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
