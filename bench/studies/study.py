"""The inside of an adapter: section 7 of the LoRA paper, and intruder dimensions, on a task of addresses.

SmolLM2-135M-Instruct in bf16 learns to answer an address with its parts as JSON (`bench.sft` has the task). lorakit's
own trainer trains about thirty adapters one after another, and `lorakit.inspection` reads them:

- one budget of parameters spent on q, k, v, o, q+v, all attention, the MLP or all of them, with one alpha for all
  ranks and with alpha = 2r, beside the causal map (Hu et al. 2021, arXiv:2106.09685, section 7.1);
- subspace similarity between ranks 8 and 64 and between two seeds, of layers' A and of their updates (7.2), and
  ‖Uᵀ W V‖F in the update's directions, the weight's own and random ones, and the amplification factor (7.3), for runs
  of normal length and for runs six times as long;
- intruder dimensions for four learning rates and three ranks (Shuttleworth et al. 2024, arXiv:2410.21228).

Finished runs are kept in --folder and are not trained again, so the study can be stopped and resumed.

Run as: python -m bench.study --data us_addresses.jsonl [--folder RUNS] [--records 192] [--held-out 64] [--seeds 1]
                              [--plots FOLDER] [--check] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

from bench.harness.plot import file_to_draw
from bench.harness.report import Target, arguments, finish
from bench.studies import study_figures, study_plots
from bench.studies.study_runs import Lab, all_runs, module_shapes
from bench.training.sft import add_data_options, chosen_records

SAME_BUDGET = 1.03  # limit of the most parameters over the fewest
CONTROL = 1.5  # limit of φ(8, 64) of random matrices over its expectation


def main() -> None:
    """Train the missing runs, measure, print, draw."""
    parser = arguments(str(__doc__))
    add_data_options(parser, records=192)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the runs of equal budget")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="folder of finished runs")
    parser.add_argument("--plots", type=Path, help="folder to draw the figures in, as SVG")
    options = parser.parse_args()
    if options.plots:
        file_to_draw(str(options.plots / "a.svg"))  # fail now, rather than at the end, if matplotlib is missing
    train, held_out = chosen_records(options)
    # Runs with other data or lengths get another folder, so that they are not mixed up.
    folder = options.folder / f"{Path(options.model).name}-{options.records}x{options.epochs:g}-{options.held_out}"
    lab = Lab(options.model, train, held_out, options.epochs, folder)
    runs = all_runs(module_shapes(options.model), options.seeds)
    for number, run in enumerate(runs, start=1):
        print(f"{number} of {len(runs)}: {run.name}", flush=True)
        lab.finished(run)
    figures = (
        study_figures.budget(lab, options.seeds)
        | study_figures.similarity(lab)
        | study_figures.amplification(lab)
        | study_figures.intruders(lab)
    )
    found = figures["intruders"]
    epochs = f"{options.epochs:g} epoch{'s' * (options.epochs != 1)}"
    title = f"{options.records} records, {epochs}, {options.held_out} held out, base in bf16"
    finish(options, title, found["columns"], found["rows"], targets(figures), more=figures)
    if options.plots:
        study_plots.draw(figures, options.plots)


def targets(figures: study_figures.Figures) -> list[Target]:
    """Return the conditions of a fair comparison; the findings about adapters are not targets."""
    parameters = [row[2] for row in figures["budget"]["rows"]]
    similarity = figures["similarity"]
    place = similarity["columns"].index("φ(8, 64)")
    control = [row[place] for row in similarity["rows"] if row[0] == study_figures.RANDOM]
    return [
        Target("parameters of the runs of one budget, most / fewest", max(parameters) / min(parameters), SAME_BUDGET),
        Target("φ(8, 64) of random matrices / its expectation", max(control) * figures["width"] / 64, CONTROL),
    ]


if __name__ == "__main__":
    main()
