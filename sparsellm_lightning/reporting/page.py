"""``report.html``: one page without other files, for a browser."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsellm_lightning.reporting.card import settings
from sparsellm_lightning.reporting.report import PruningReport

CORNER = 96  # rows and columns of a picture of zeros

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; }
img { max-width: 100%; } .bar { background: #4a7ab5; height: .8em; display: inline-block; }
figure { display: inline-block; margin: 0 1em 1em 0; } figure img { width: 192px; image-rendering: pixelated; }
blockquote { margin: .5em 0 .5em 1em; white-space: pre-wrap; } .prompt { color: #888; }
pre { background: #f6f6f6; padding: 1em; }
"""


def report_page(report: PruningReport, folder: Path, images: Sequence[str] = ()) -> str:
    """The page of an exported folder.

    Args:
        report: of the run.
        folder: that holds the weights as safetensors, and the images.
        images: names of plots in the folder.
    """
    title = html.escape(f"{report.model}, {report.label}, {100 * report.exported_sparsity:.2f} % zeros")
    parts = [
        f"<h1>{title}</h1>",
        _perplexities(report),
        _examples(report.examples),
        "".join(_image(_uri((folder / name).read_bytes()), name) for name in images),
        _time(report),
        _zeros(report, folder),
        f"<p>{html.escape(report.circumstances())}</p>",
        f"<h2>Settings</h2><pre>{html.escape(settings(report))}</pre>" if report.config else "",
    ]
    return _page(title, parts)


def sweep_page(model: str, rows: Sequence[dict[str, Any]], picture: Path | None = None) -> str:
    """The page of a sweep: a table, and the curve if there is a picture of it."""
    title = html.escape(f"{model} by sparsity")
    cells = [[_cell(value) for value in row.values()] for row in rows]
    parts = [f"<h1>{title}</h1>", html_table([list(rows[0]), *cells])]
    return _page(title, parts if picture is None else [*parts, _image(_uri(picture.read_bytes()), picture.name)])


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _cell(value: object) -> object:
    """A number with four digits. Nothing for NaN."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"


def html_table(rows: Sequence[Sequence[object]]) -> str:
    """A table. Cells are text; the first row is the heading."""
    head, *body = ([html.escape(str(cell)) for cell in row] for row in rows)
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _perplexities(report: PruningReport) -> str:
    rows = report.losses()
    return html_table(rows) if len(rows) > 1 else ""


def _examples(examples: Iterable[dict[str, str]]) -> str:
    """Prompts, and how the models go on."""
    parts = []
    for example in examples:
        prompt = html.escape(example["prompt"])
        lines = [
            f'<p>{html.escape(state)}</p><blockquote><span class="prompt">{prompt}</span>{html.escape(text)}</blockquote>'
            for state, text in example.items()
            if state != "prompt"
        ]
        parts.append("".join(lines))
    return "<h2>How the models continue a text</h2>" + "<hr>".join(parts) if parts else ""


def _time(report: PruningReport) -> str:
    """Seconds by phase as bars."""
    longest = max(report.phases.values(), default=0.0)
    if not longest:
        return ""
    lines = [
        f"<tr><td>{html.escape(phase)}</td><td>{seconds:.1f} s</td>"
        f'<td><span class="bar" style="width:{300 * seconds / longest:.0f}px"></span></td></tr>'
        for phase, seconds in report.phases.items()
    ]
    return f"<h2>Where the time went</h2><table>{''.join(lines)}</table>"


def _zeros(report: PruningReport, folder: Path) -> str:
    """The zeros of one projection of each kind, from the middle block that has one, as written."""
    kinds: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer["sparsity"] > 0:
            kinds.setdefault(layer["name"].rsplit(".", 1)[-1], []).append(layer["name"])
    chosen = {f"{names[len(names) // 2]}.weight": kind for kind, names in kinds.items()}
    pictures = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in (name for name in chosen if name in file.keys()):  # noqa: SIM118  it is no dict
                corner = file.get_slice(name)[:CORNER, :CORNER]
                label = f"<figcaption>{html.escape(name.removesuffix('.weight'))}</figcaption>"
                pictures.append(f"<figure>{_image(_uri(png(corner != 0)), name)}{label}</figure>")
    if not pictures:
        return ""
    return (
        f"<h2>Zeros</h2><p>The first {CORNER} rows and columns of some projections; dark: kept.</p>{''.join(pictures)}"
    )


def png(kept: Tensor) -> bytes:
    """A picture of a (rows, columns) bool matrix: dark where True."""
    rows, columns = kept.shape
    pixels = torch.where(kept, 40, 230).to(torch.uint8).tolist()
    lines = b"".join(b"\0" + bytes(row) for row in pixels)  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)  # 8 bits of grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _image(source: str, name: str) -> str:
    return f'<img src="{source}" alt="{html.escape(name)}">'
