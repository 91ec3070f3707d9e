"""The study without its training: ranks of one budget, figures read off planted adapters, the page's tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from made import conversations, small_config, small_decoder, write_checkpoint

from bench import pages
from bench.studies import study, study_figures, study_plots, study_runs
from bench.studies.study_runs import EIGHT, MODULES, TIMES, WIDE, Lab, Run
from lorakit import LoraConfig, add_adapter, save_adapter
from lorakit.adapters import lora_layers
from lorakit.layers.adapted import AdaptedLayer

SHAPE = {"hidden_size": 128, "intermediate_size": 160, "num_key_value_heads": 4, "num_hidden_layers": 3}
SMOLLM2 = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576),
           "gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}  # fmt: skip


def plant(lab: Lab, run: Run, fill: Callable[[AdaptedLayer], None]) -> None:
    """Put an adapter into the folder as if it had been trained."""
    model = lab.base_model()
    torch.manual_seed(run.seed)
    add_adapter(model, LoraConfig(r=run.rank, lora_alpha=2 * run.rank, target_modules=list(MODULES[run.modules])))
    for layer in lora_layers(model, "default").values():
        fill(layer)
    save_adapter(model, lab.adapter(run))
    losses = {"parameters": study_runs.parameters_per_rank(study_runs.module_shapes(lab.model), MODULES[run.modules])}
    losses["parameters"] *= run.rank
    (lab.folder / run.name / "losses.json").write_text(json.dumps(losses | {"held_out": 1.0, "general": 2.0}))


def random_b(size: float) -> Callable[[AdaptedLayer], None]:
    def fill(layer: AdaptedLayer) -> None:
        torch.nn.init.normal_(layer.lora_B["default"], std=size)

    return fill


def one_direction(layer: AdaptedLayer) -> None:
    """A large update from the first input to the first output, whatever the rank and the seed."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    torch.nn.init.normal_(b, std=1e-4)
    b.data[0, 0], a.data[0] = 100.0, 0.0
    a.data[0, 0] = 1.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("study")
    config = small_config(**SHAPE)
    model = write_checkpoint(folder / "model", small_decoder(**SHAPE), config)
    lab = Lab(str(model), conversations(8), conversations(4, start=8), 1, folder / "runs")
    for run in study_runs.all_runs(study_runs.module_shapes(str(model)), seeds=1):
        plant(lab, run, random_b(1e-3))
    for run in (run.longer(times) for times in TIMES for run in (EIGHT, *WIDE)):
        plant(lab, run, one_direction)
    return lab


@pytest.mark.parametrize("name", MODULES)
def test_the_ranks_of_one_budget_are_the_nearest(name: str) -> None:
    ranks = study_runs.equal_ranks(SMOLLM2)
    each = study_runs.parameters_per_rank(SMOLLM2, MODULES[name])
    budget = study_runs.BUDGET_RANK * study_runs.parameters_per_rank(SMOLLM2, MODULES["all-linear"])
    assert ranks["all-linear"] == study_runs.BUDGET_RANK
    assert all(abs(ranks[name] * each - budget) <= abs(other * each - budget) for other in range(1, 200))
    assert max(budget, ranks[name] * each) / min(budget, ranks[name] * each) < study.SAME_BUDGET


def test_parameters_are_those_that_an_adapter_has(lab: Lab) -> None:
    shapes = study_runs.module_shapes(lab.model)
    for kinds in MODULES.values():
        model = lab.base_model()
        add_adapter(model, LoraConfig(r=3, target_modules=list(kinds)))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 3 * study_runs.parameters_per_rank(shapes, kinds)


def test_a_planted_direction_is_found_between_ranks_and_seeds(lab: Lab) -> None:
    found = study_figures.similarity(lab)
    rows = {tuple(row[:4]): row[4:] for row in found["similarity"]["rows"]}
    for kind, times, pair in product(study_figures.KINDS, TIMES, ("r=8 and 64", "two seeds, r=64")):
        first, *_, cosine = rows[kind, times, "update", pair]
        assert first > 0.999 and cosine > 0.999
    assert rows[study_figures.RANDOM, None, "", "r=64"][3] == pytest.approx(64 / SHAPE["hidden_size"], rel=0.1)
    assert found["maps"]["q_proj|update|r=8 and 64"][0][0] > 0.999 and found["middle"] == 1


@pytest.fixture(scope="module")
def figures(lab: Lab) -> study_figures.Figures:
    """All of them, as the JSON file has them."""
    (lab.folder / "base").mkdir()
    (lab.folder / "base" / "losses.json").write_text('{"parameters": 0, "held_out": 3.0, "general": 1.5}')
    found = study_figures.budget(lab, 1) | study_figures.similarity(lab)
    found |= study_figures.amplification(lab) | study_figures.intruders(lab)
    plain: study_figures.Figures = json.loads(json.dumps(found))
    return plain


def test_planted_intruders_are_counted_and_targets_met(figures: study_figures.Figures) -> None:
    rows = {(row[0], row[1]): row for row in figures["intruders"]["rows"]}
    assert rows["0.0005", "8"][3] == 21 and rows["0.0001", "8"][3] == 0  # planted in every matrix, and in none
    for row in figures["amplification"]["rows"]:
        assert row[-1] == pytest.approx(row[7] / row[3])
    assert all(target.met for target in study.targets(figures)[1:])


def test_tables_are_written_between_their_markers_and_pictures_drawn(
    figures: study_figures.Figures, tmp_path: Path
) -> None:
    measured, page = tmp_path / "study.json", tmp_path / "page.md"
    measured.write_text(json.dumps(figures))
    page.write_text("before\n<!-- table budget -->\nold\n<!-- end of table -->\nafter\n")
    pages.fill(measured, page)
    before, _, rest = page.read_text().partition("<!-- table budget -->\n")
    assert before == "before\n" and rest.endswith("<!-- end of table -->\nafter\n")
    assert "| all-linear | 8 |" in rest and "old" not in rest
    for name in study_plots.PICTURES:
        assert (tmp_path / f"study_{name}.svg").stat().st_size > 5_000
    page.write_text("<!-- table bugdet -->\n<!-- end of table -->\n")
    with pytest.raises(KeyError, match="bugdet"):
        pages.fill(measured, page)
