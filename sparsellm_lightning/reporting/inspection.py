"""What was found in a model, as text: its blocks, what is solved together in them, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from sparsellm_lightning.architecture import Block, DecoderLayout, Linears, Network, Unit


def structure(layout: DecoderLayout) -> str:
    """One paragraph for each run of equal blocks, and the share of the model's parameters that is pruned."""
    lines = []
    for found, blocks in groupby(layout.blocks, _lines):
        lines += [_heading(list(blocks)), *found, ""]
    pruned = sum(p.size for p in layout.projections() if p.pruned)
    total = sum(parameter.numel() for parameter in layout.model.parameters())
    return "\n".join([*lines, f"{pruned:,} of {total:,} parameters are pruned ({100 * pruned / total:.1f} %)."])


def _heading(blocks: Sequence[Block]) -> str:
    first, last = blocks[0], blocks[-1]
    names = first.name if first is last else f"{first.name} to {last.name.rpartition('.')[2]}"
    return f"{names} ({type(first.module).__name__})"


def _lines(block: Block) -> list[str]:
    lines = [f"  {line}" for unit in block.units for line in _unit_lines(unit, f"{block.name}.")]
    reasons: dict[str, list[str]] = {}
    for name, reason in block.dense.items():
        reasons.setdefault(reason, []).append(name.removeprefix(f"{block.name}."))
    return lines + [f"  dense: {', '.join(names)} ({reason})" for reason, names in reasons.items()]


def _unit_lines(unit: Unit, prefix: str) -> Iterator[str]:
    if isinstance(unit, Linears):
        yield "one input: " + ", ".join(
            f"{p.name.removeprefix(prefix)} {'+'.join(map(str, p.parts)) or p.shape[0]} x {p.shape[1]}{_kept(p.pruned)}"
            for p in unit.projections
        )
    elif isinstance(unit, Network):
        yield f"feed-forward network: {_form(unit, prefix)}"
    else:
        count = len(unit.networks)
        yield f"{count} experts, {round(unit.share * count)} a token: {_form(unit.networks[0], prefix)}"


def _form(network: Network, prefix: str) -> str:
    names = {role: p.name.removeprefix(prefix) + _kept(p.pruned) for role, p in network.roles.items()}
    outputs, width = network.roles["down"].shape
    activation = network.activation.name
    up = names["up"] + (f" + {network.up_offset:g}" if network.up_offset else "")
    hidden = f"{activation}({names['gate']}) * ({up})" if "gate" in names else f"{activation}({up})"
    added = "not simply added to"
    if network.scale is not None:
        times = f"{network.scale:.4g}"
        added = "added to" if times == "1" else f"{times} times added to"
    return f"{names['down']} <- {hidden}, {outputs} x {width}, {added} the block's output"


def _kept(pruned: bool) -> str:
    return "" if pruned else " (dense)"
