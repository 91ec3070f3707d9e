"""The study's figures, one function a question, all computed with lorakit.inspection.

Each function returns JSON values: tables (columns and rows), and data that only the pictures show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.studies.study_runs import (
    ALL,
    ALPHA,
    BUDGET_RANK,
    EIGHT,
    NARROW,
    RANKS,
    RATES,
    TIMES,
    WIDE,
    Lab,
    Run,
    budget_runs,
    module_shapes,
)
from lorakit.adapters.low_rank import LowRank
from lorakit.adapters.peft.folder import AdapterLayer, read_adapter_folder
from lorakit.inspection import compare_updates, compare_with_base, singular_vectors, subspace_similarity
from lorakit.inspection.interventions.studies import causal_map
from lorakit.inspection.measure.base_weights import BaseWeights
from lorakit.inspection.measure.module_paths import module_paths
from lorakit.inspection.measure.updates import Updates

KINDS = ("q_proj", "v_proj")  # the modules that the paper shows
SHOWN = ((1, 1), (1, 8), (8, 8), (8, 64))  # (i, j), in the table
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # leading directions, in the heat maps
RANDOM = "random"
Figures = dict[str, Any]


def budget(lab: Lab, seeds: int) -> Figures:
    """Return the losses of each way to spend the budget (section 7.1), and an ablation of all-linear."""
    shapes = module_shapes(lab.model)
    ways = {
        f"loss, alpha = {words}{f', seed {seed}' if seeds > 1 else ''}": budget_runs(shapes, seed, alpha)
        for words, alpha in ((f"{ALPHA:g}", ALPHA), ("2r", None))
        for seed in range(seeds)
    }
    rows = [
        [runs[0].modules, runs[0].rank, lab.finished(runs[0]).parameters, *(lab.finished(run).held_out for run in runs)]
        for runs in zip(*ways.values(), strict=True)
    ]
    columns = ["modules", "rank", "parameters", *ways]
    model = lab.loaded(EIGHT)
    without, alone = (causal_map(model, lab.metric, by="kind", keep=keep) for keep in (False, True))
    causal = [
        [a.what, a.value, a.share, b.value, None if b.share is None else 1 - b.share]
        for a, b in zip(without.effects, alone.effects, strict=True)
    ]
    names = ["kind", "loss without it", "share lost", "loss with it alone", "share it has alone"]
    return {
        "budget": table(columns, rows), "causal": table(names, causal),
        "whole": without.whole, "without adapter": without.other,
    }  # fmt: skip


def similarity(lab: Lab) -> Figures:
    """Return the subspace similarity between ranks and between seeds (section 7.2), of A and of the update, by layer.

    The table has runs of both lengths; maps and curves have the longer ones.
    """
    rows: list[list[Any]] = []
    maps: Figures = {}
    curves: Figures = {}
    for times in TIMES:
        eight, first, second = (_layers(lab, run.longer(times)) for run in (EIGHT, *WIDE))
        place = module_paths(first)
        pairs = {f"r={BUDGET_RANK} and 64": (eight, first), "two seeds, r=64": (first, second)}
        for kind, (which, directions), (pair, (a, b)) in product(KINDS, DIRECTIONS.items(), pairs.items()):
            paths = [path for path in first if place[path].module == kind]
            found = [subspace_similarity(directions(a[path]), directions(b[path])) for path in paths]
            cosines = [compare_updates(path, a[path].update(), b[path].update()).cosine for path in paths]
            cosine = mean(cosines) if which == "update" else None
            rows.append([kind, lab.epochs * times, which, pair, *_summary(found), cosine])
            curves[f"{kind}|{which}|{pair}"] = [_at(phi, 1, 8) for phi in found]
            maps[f"{kind}|{which}|{pair}"] = _grid(found[len(paths) // 2])
    width = first[paths[0]].lora_A.shape[1]
    control = [_random_similarity(width, seed) for seed in range(len(paths))]
    rows.append([RANDOM, None, "", "r=64", *_summary(control), None])
    for kind in KINDS:
        curves[f"{kind}|{RANDOM}"] = [_at(phi, 1, 8) for phi in control]
        maps[f"{kind}|{RANDOM}"] = _grid(control[len(paths) // 2])
    columns = ["module", "epochs", "directions of", "adapters", *(f"φ({i}, {j})" for i, j in SHOWN)]
    middle = place[paths[len(paths) // 2]].index
    found_in = {"maps": maps, "curves": curves, "middle": middle, "width": width}
    return {"similarity": table([*columns, "cosine of the updates"], rows)} | found_in


def amplification(lab: Lab) -> Figures:
    """Return ‖Uᵀ W V‖F in the update's, the weight's own and random directions, and the amplification (section 7.3).

    The table has runs of both lengths; the factors of all layers come from the longer ones.
    """
    weights, rows, factors = BaseWeights(lab.model), list[list[Any]](), Figures()
    for kind, times in product(KINDS, TIMES):
        for run in (run.longer(times) for run in (NARROW, EIGHT, WIDE[0])):
            layers = [layer for layer in lab.inspected(run) if layer["module"] == kind]
            factors[f"{kind}|{run.rank}"] = [layer["amplification"] for layer in layers]
            layer = layers[len(layers) // 2]
            update = next(update for update in Updates(lab.adapter(run)) if update.path == layer["name"])
            weight = weights.weight(update)
            assert weight is not None
            vectors = singular_vectors(weight)
            random = _random_update(update.low_rank.shape, run.rank)
            control = compare_with_base(random, weight, vectors).amplification
            assert control is not None
            rows.append([
                kind, lab.epochs * times, run.rank, layer["norm"] / layer["amplification"],
                float(vectors.s[: run.rank].norm()), float(random.norm()) / control,
                layer["base_norm"], layer["norm"], layer["amplification"],
            ])  # fmt: skip
    columns = ["module", "epochs", "r", "‖UᵀWV‖ of Δ", "of W", "of random", "‖W‖", "‖Δ‖", "amplification"]
    return {"amplification": table(columns, rows), "factors": factors}


def intruders(lab: Lab) -> Figures:
    """Return intruder dimensions by learning rate and rank, beside the losses on the task and on general text."""
    base = lab.finished(None)
    rows: list[list[Any]] = [["", "", 0.0, 0, None, base.held_out, base.general]]
    kinds: Figures = {}
    for lr in RATES:
        for rank in RANKS:
            run = Run("all-linear", rank, lr)
            layers, losses = lab.inspected(run), lab.finished(run)
            found = [layer["intruders"] for layer in layers]
            norm = mean(layer["relative_norm"] for layer in layers)
            hit = sum(count > 0 for count in found)
            rows.append([f"{lr:g}", str(rank), mean(found), hit, norm, losses.held_out, losses.general])
            kinds[f"{lr:g}|{rank}"] = {
                kind: mean(layer["intruders"] for layer in layers if layer["module"] == kind) for kind in ALL
            }
    columns = ["lr", "r", "intruders a matrix", "matrices with one", "mean ‖Δ‖/‖W‖", "held-out loss", "general loss"]
    return {"intruders": table(columns, rows), "kinds": kinds}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Figures:
    """Return a table as JSON values."""
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _layers(lab: Lab, run: Run) -> Mapping[str, AdapterLayer]:
    """Return a finished run's layers, from its folder."""
    lab.finished(run)
    return read_adapter_folder(lab.adapter(run)).layers


def _of_a(layer: AdapterLayer) -> Tensor:
    """Return the right singular vectors of A, (in, r), which the paper compares."""
    return LowRank(torch.eye(layer.rank, dtype=torch.float64), layer.lora_A.double()).svd[2].T


def _of_update(layer: AdapterLayer) -> Tensor:
    """Return the right singular vectors of the update, (in, r): directions in A's row space, weighted by B."""
    return layer.update().svd[2].T


DIRECTIONS: dict[str, Callable[[AdapterLayer], Tensor]] = {"A": _of_a, "update": _of_update}


def _at(phi: Tensor, i: int, j: int) -> float:
    return round(float(phi[i - 1, j - 1]), 4)


def _summary(found: Collection[Tensor]) -> list[float]:
    """Return the mean over the layers of φ at the (i, j) of SHOWN."""
    return [mean(_at(phi, i, j) for phi in found) for i, j in SHOWN]


def _grid(phi: Tensor) -> list[list[float]]:
    """Return φ at the STEPS within the two ranks."""
    rows, columns = ([step for step in STEPS if step <= size] for size in phi.shape)
    return [[_at(phi, i, j) for j in columns] for i in rows]


def _random_similarity(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(width, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    return subspace_similarity(*(torch.linalg.qr(side).Q for side in sides))


def _random_update(shape: tuple[int, int], rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape)
    return LowRank(up, down.T)
