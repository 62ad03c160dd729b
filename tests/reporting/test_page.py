"""The pages hold everything themselves, and their pictures are the zeros of the files."""

from __future__ import annotations

import base64
import io
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.batches import random_batches
from support.models import build_model

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.reporting import PruningReport, save_companions, save_sweep
from sparsellm_lightning.reporting.page import CORNER, png, report_page


class Page(HTMLParser):
    """The text and the images of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.images: dict[str, str] = {}
        self.links: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.images[values["alt"]] = values["src"]
        self.links += [values[name] for name in ("href", "src") if name in values]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def pixels(source: str) -> torch.Tensor:
    assert source.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
    return torch.tensor(list(image.getdata())).view(image.height, image.width)


@pytest.fixture
def report() -> PruningReport:
    model = build_model("llama")
    config = PruningConfig(sparsity=0.6, preset="paper", num_calibration_samples=8)
    report = prune_model(model, random_batches(), config)
    report.model = "a <b>bold</b> model"
    report.perplexity = {"dense": 10.0, "pruned": 20.0}
    report.examples = [{"prompt": "if a < b", "dense": " & c", "pruned": " <i>"}]
    report.built = model  # type: ignore[attr-defined]
    return report


@pytest.mark.draws
def test_report_page(report: PruningReport, tmp_path: Path) -> None:
    model = report.built  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path)
    save_companions(report, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    text = "".join(page.text)
    assert "a <b>bold</b> model" in text
    assert all(part in text for part in ("0.693", "if a < b", " & c", " <i>", "alternation", "sparsity: 0.6"))
    assert all(link.startswith("data:") for link in page.links), "nothing is loaded from elsewhere"
    assert {"stages.png", "layers.png"} <= page.images.keys()
    kinds = {name.rsplit(".", 2)[-2] for name in page.images if name.endswith(".weight")}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, source in page.images.items():
        if name.endswith(".weight"):
            kept = model.get_parameter(name).detach()[:CORNER, :CORNER] != 0
            assert torch.equal(pixels(source) < 128, kept)


def test_a_page_without_measurements(report: PruningReport, tmp_path: Path) -> None:
    report.perplexity, report.examples, report.phases, report.config = {"dense": None, "pruned": None}, [], {}, {}
    page = Page(report_page(report, tmp_path))
    assert page.images == {}
    assert "60.0" in "".join(page.text)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (96, 40)])
def test_png(shape: tuple[int, int]) -> None:
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    source = "data:image/png;base64," + base64.b64encode(png(kept)).decode()
    assert torch.equal(pixels(source) < 128, kept)


@pytest.mark.draws
def test_sweep_page(tmp_path: Path) -> None:
    rows = [
        {"variant": "dense", "sparsity": 0.0, "perplexity": 10.0},
        {"variant": "fast", "sparsity": 0.5, "perplexity": 12.5},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sweep("a<b", rows, tmp_path)
    page = Page((tmp_path / "sweep.html").read_text())
    assert {"a<b by sparsity", "variant", "fast", "12.5"} <= set(page.text)
    assert pixels(page.images["sweep.png"]).numel() > 1000
