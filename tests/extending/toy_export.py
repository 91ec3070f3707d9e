"""An export: a text file for a program that wants only each layer's rank and scaling."""

from __future__ import annotations

from pathlib import Path

from lorakit.adapters.exports.export import Export


def export_scalings(export: Export, path: Path) -> None:
    lines = [f"{name} {layer.rank} {layer.scaling:g}" for name, layer in export.layers.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
