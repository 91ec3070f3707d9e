"""Peak memory of training on the CPU: what `lorakit.plan` predicts from config.json, and what processes take.

Each configuration is a process of its own that loads the model and takes three steps (`bench.sides.lorakit_step`). They
differ in shape, format of the weights, length, batch, checkpointing, optimizer and adapter. `runtime` is the memory of
a process that trains next to nothing, which the prediction starts from; it is measured first, unless --constant asks
for the library's own constant.

Run as: python -m bench.plan [--check] [--json FILE] [--folder DIR] [--constant] [--only TEXT]
Checkpoints with random weights are made in DIR (default: a temporary folder, removed at the end).
"""

from bench.training.memory import beside_plan

if __name__ == "__main__":
    beside_plan(str(__doc__))
