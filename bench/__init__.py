"""Side-by-side measurements. Each module says at its top what it measures and how to run it.

    harness    shared parts: timing, processes, reports, pictures, peers
    kernels    the kernels on this processor
    gpu        the Triton kernels, run or only compiled
    training   steps, whole runs, memory and plans; `sides` has one script for each side of a comparison
    adapters   merging, switching, DoRA, probes, inspection, exports
    studies    questions that need many runs

Commands leave the room out: `python -m bench.train_step` runs bench/training/train_step.py, because `__path__` includes
the rooms. Modules import each other by their full names (`from bench.harness.timing import medians`), so that no module
is loaded under two names.
"""

from pathlib import Path

ROOMS = ("harness", "kernels", "gpu", "training", "adapters", "studies")

__path__ += [str(Path(__file__).parent / room) for room in ROOMS]
