"""lorakit's inspection of an adapter folder, timed: everything that `lorakit inspect` measures, table included.

Run as: python -m bench.inspect_lorakit FOLDER [--base MODEL] [--rounds 3]
It prints one line of JSON: seconds of each round, peak memory, and by layer the figures that gradience also measures.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from lorakit.inspection import inspect_adapter


def main() -> None:
    """Inspect, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--base")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        info = inspect_adapter(options.folder, base=options.base)
        info.table()
        seconds.append(time.perf_counter() - start)
    layers = {
        layer.name: {
            "singular_values": list(layer.singular_values),
            "norm": layer.norm,
            "stable_rank": layer.stable_rank,
            "effective_rank": layer.effective_rank,
            "rank_for_90": layer.rank_for(0.90),
        }
        for layer in info.layers
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "layers": layers}))


if __name__ == "__main__":
    main()
