"""gradience's audit of an adapter folder, timed. It does not import lorakit, so gradience's own Python can run it.

Run as: python -m bench.inspect_gradience FOLDER [--rounds 3]
It prints one line of JSON, as bench.inspect_lorakit does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import time

from gradience.vnext.audit.lora_audit import audit_lora_peft_dir


def main() -> None:
    """Audit, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.rounds):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress
            start = time.perf_counter()
            result = audit_lora_peft_dir(options.folder, include_top_singular_values=4096)
            seconds.append(time.perf_counter() - start)
    layers = {
        layer.name.removeprefix("base_model.model."): {
            "singular_values": [value * layer.scale for value in layer.top_singular_values],  # gradience's are of B·A
            "norm": layer.delta_fro_norm,
            "stable_rank": layer.stable_rank,
            "effective_rank": layer.effective_rank,
            "rank_for_90": layer.energy_rank_90,
        }
        for layer in result.layers
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "layers": layers}))


if __name__ == "__main__":
    main()
