"""Peak memory of training on the CPU: the prediction of `lorakit.plan` from config.json beside measured processes.

A separate process for each configuration loads the model and takes three steps (`bench.sides.lorakit_step`). The
configurations differ in shape, format of the weights, length, batch, checkpointing, optimizer and adapter. `runtime` is
the memory of a process that trains a tiny model, and part of the prediction. It is measured first, unless --constant
selects the library's own constant.

Run as: python -m bench.plan [--check] [--json FILE] [--folder DIR] [--constant] [--ragged] [--only TEXT]
Checkpoints with random weights are written to DIR (default: a temporary folder, removed at the end).
"""

from bench.training.memory import beside_plan

if __name__ == "__main__":
    beside_plan(str(__doc__))
