"""``sparsellm benchmark``: sizes against counts, and pairs of repetitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import build_model

from sparsellm_lightning import UserError
from sparsellm_lightning.cli import main
from sparsellm_lightning.models import Speed, measure_speed, speed
from sparsellm_lightning.models.speed import use_semi_structured
from sparsellm_lightning.reporting import speed_table


def test_sizes_and_repetitions(tmp_path: Path) -> None:
    model = build_model("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "a")
    build_model("gpt2").save_pretrained(tmp_path / "b")
    one, other = measure_speed([str(tmp_path / "a"), str(tmp_path / "b")], prompt_tokens=16, new_tokens=4, repeats=3)
    assert one.parameters == sum(p.numel() for p in model.parameters())
    assert one.zeros == sum(int((p == 0).sum()) for p in model.parameters())
    assert one.file_bytes == sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors"))
    assert one.memory_bytes >= 4 * one.parameters
    for measured in (one, other):
        assert [len(getattr(measured, figure)) for figure in ("load", "prefill", "decode")] == [3, 3, 3]
        assert min(measured.load + measured.prefill + measured.decode) > 0


def test_rates_of_models_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(tmp_path / name) for name in "ab"]
    for name in names:
        build_model("llama").save_pretrained(name)
    called: list[str] = []

    def seconds(call: Any, device: torch.device) -> float:
        called.append(call.args[0] if isinstance(call.args[0], str) else "model")
        return 2.0

    monkeypatch.setattr(speed, "_seconds", seconds)
    one, _ = measure_speed(names, prompt_tokens=16, new_tokens=4, repeats=2)
    assert (one.load, one.prefill, one.decode) == ([2.0, 2.0], [8.0, 8.0], [2.0, 2.0])
    assert [name for name in called if name != "model"] == 3 * names


def test_table_compares_pair_by_pair() -> None:
    """The machine slows down threefold in the second repetition. The ratio does not change."""
    fast = Speed("small", 50, 0, 200, 2**20, [1.0, 3.0, 1.0], [300.0, 100.0, 300.0], [30.0, 10.0, 33.0])
    slow = Speed("dense", 100, 10, 400, None, [2.0, 6.0, 2.0], [150.0, 50.0, 100.0], [20.0, 5.0, 11.0])
    assert (fast.times(slow, "load"), fast.times(slow, "prefill"), fast.times(slow, "decode")) == (0.5, 2.0, 2.0)
    lines = {line.split("  ")[0]: line.split() for line in speed_table([fast, slow]).splitlines()}
    assert lines["parameters"][1:] == ["50", "100", "0.50"]
    assert lines["zeros"][1:] == ["0.0", "%", "10.0", "%"]
    assert lines["file, MiB"][2:] == ["1.0", "-"]
    assert lines["decode, tokens/s"][2:] == ["30.0", "11.0", "2.00"]


def test_the_ratio_is_of_the_fastest_kernels() -> None:
    """Of the first model. The last one is compared on dense kernels."""
    rates: dict[str, list[float]] = {"load": [1.0], "prefill": [100.0]}
    dense, sparse = (Speed("a", 50, 25, 4, 2, decode=[speed], **rates) for speed in (10.0, 13.0))
    sparse = replace(sparse, kernels="2:4", memory_bytes=3)
    other = Speed("b", 50, 0, 4, 2, decode=[10.0], **rates)
    for speeds in ([dense, sparse], [dense, sparse, other], [dense, sparse, other, replace(other, kernels="2:4")]):
        lines = {line.split("  ")[0]: line.split() for line in speed_table(speeds).splitlines()}
        assert lines["decode, tokens/s"][-1] == "1.30"
        assert lines["memory, MiB"][-1] == "0.75"


def test_weights_that_sparse_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers in 16 bits with 2:4 zeros, in the shapes of the kernels; the head is dense. Their call is a stand-in."""
    model = build_model("llama").bfloat16()
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() == 2 and "down" not in name:
            parameter.data.view(-1, 4)[:, 1:3] = 0
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: taken.append(weight) or weight)
    assert use_semi_structured(model) == len(taken) == 3 * 6
    assert use_semi_structured(build_model("llama")) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
def test_sparse_kernels(tmp_path: Path) -> None:
    model = build_model("llama").bfloat16()
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.data.view(-1, 4)[:, 1:3] = 0
    model.save_pretrained(tmp_path)
    dense, sparse = measure_speed([str(tmp_path)], prompt_tokens=16, new_tokens=4, repeats=1)
    assert (dense.kernels, sparse.kernels) == ("dense", "2:4")
    assert min(sparse.prefill + sparse.decode) > 0
    assert sparse.memory_bytes < dense.memory_bytes


def test_an_export_keeps_its_speed_in_its_report(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    (tmp_path / "pruning_report.json").write_text('{"files": []}')
    build_model("gpt2").save_pretrained(tmp_path / "dense")
    beside = ["--against", str(tmp_path / "dense")]
    main(["benchmark", str(tmp_path), *beside, "--prompt_tokens", "8", "--new_tokens", "2", "--repeats", "1"])
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["files"] == []
    assert [speed["name"] for speed in report["speed"]] == [str(tmp_path), beside[1]]
    assert len(report["speed"][0]["decode"]) == 1
    assert len(list(tmp_path.glob("*report*"))) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_model("llama").save_pretrained(tmp_path)
    main(["benchmark", str(tmp_path), "--prompt_tokens", "8", "--new_tokens", "2", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert "decode, tokens/s" in shown
    assert "times" not in shown
    with pytest.raises(SystemExit):
        main(["benchmark", str(tmp_path), "--prompt_tokens", "1000"])
    assert "holds 128 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="repeats must be at least 1"):
        measure_speed([str(tmp_path)], repeats=0)


def test_what_is_timed() -> None:
    model, seen = build_model("llama"), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    speed._prefill(model, 16)
    assert seen == [16]
    seen.clear()
    speed._decode(model, 4)
    assert seen[1:] == [1, 1, 1], "four new tokens, the first one by the prompt"


def test_a_folder_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    build_model("llama").save_pretrained(tmp_path / "x")
    (tmp_path / "x/pruning_report.json").write_text('{"files": []}')
    main(["benchmark", "~/x", "--prompt_tokens", "8", "--new_tokens", "2", "--repeats", "1"])
    assert json.loads((tmp_path / "x/pruning_report.json").read_text())["speed"][0]["file_bytes"] > 0
