"""The house as planned: floors and rooms, no circles, nothing private across modules, documented, of readable size.

The sources are read, never imported. The rules are functions of tests/architecture, where each is tested on a planted
breach; here they are applied to the tree, as the table below says.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from docstring_rules import missing_breaches, shape_breaches
from source_rules import (
    Breach,
    argument_breaches,
    circle_breaches,
    floor_breaches,
    folder_breaches,
    length_breaches,
    private_breaches,
    public_names,
    room_breaches,
    twice_defined_breaches,
)

# From the ground up. A file imports only from its own floor and from those below. The longest name decides.
FLOORS = (
    ("lorakit_kernels",),
    ("lorakit.errors", "lorakit.files", "lorakit.measure", "lorakit.settings", "lorakit.sizes"),
    ("lorakit.quantization",),
    ("lorakit.layers", "lorakit.checkpoints"),
    ("lorakit.models", "lorakit.adapters"),
    ("lorakit.data", "lorakit.training", "lorakit.evaluation", "lorakit.inspection", "lorakit.planning"),
    ("lorakit.runs",),
    ("lorakit.cli",),
    ("lorakit.__init__",),  # the public face
    ("bench",),
)

# Package -> its rooms, from the ground up: a room imports from those beside it in a row and from the rows before.
ROOMS = {
    "lorakit_kernels": (("ops",), ("cpu", "triton")),
    "lorakit.layers": (("variants",),),
    "lorakit.models": (("tokenizer", "gguf"), ("decoder",)),
    "lorakit.adapters": (("config", "inits", "starts"), ("attach",), ("peft",), ("low_rank", "merging", "exports")),
    "lorakit.training": (("optimizers",),),
    "lorakit.inspection": (("compare",), ("measure",), ("quantization", "interventions", "probes"), ("html",)),
    "bench": (("harness",), ("kernels", "training"), ("gpu", "adapters", "studies")),
}

# (importer, imported) -> why an import inside a function may go back along a circle.
LATE_IMPORTS: dict[tuple[str, str], str] = {}

MOST_LINES, MOST_FILES, MOST_ARGUMENTS = 400, 15, 6
# What registers an operation: torch.library's functions and the kernels' own, and Triton's compiler.
REGISTRATION = r"jit|autotune|_?operation|_?register(_\w+)?"
WITH_DTYPES = ("kernels/", "lorakit/quantization/")  # where bytes are what a function is about
DEFINITIONS = ("kernels/lorakit_kernels/ops/", "kernels/lorakit_kernels/reference")  # of operations, in plain PyTorch

# Class name -> why two classes may have it.
SAME_NAMES: dict[str, str] = {}

PUBLIC = {
    "lorakit/__init__.py": """
        AdapterInfo Decoder Linear4bit LoRALinear LoraConfig LorakitError MergeReport Plan QuantizedWeight Record
        Tokenizer TrainConfig TrainResult adapter_parameters adapter_status add_adapter disable_adapters generate
        inspect_adapter load_adapter load_model load_records load_tokenizer merge_adapter plan quantize remove_adapter
        save_adapter save_records set_adapter set_trained swap_adapter train unmerge_adapter use_rows
    """,
    "kernels/lorakit_kernels/__init__.py": """
        BACKENDS adamw_8bit add_linear_4bit_dx cross_entropy dequantize_4bit dequantize_4bit_out dequantize_8bit drop
        gradients linear_4bit linear_4bit_dx one_thread quantize_4bit quantize_8bit reference reference_training
        rms_norm rms_norm_backward rope swiglu swiglu_backward use_backend
    """,
}

# What is still to be mended, by rule. It only ever shrinks: a line that is no longer a breach has to go.
KNOWN_BREACHES: dict[str, tuple[str, ...]] = {
    "circles": ("lorakit/layers/adapted.py: imports in a circle: lorakit.layers.rows -> lorakit.layers.adapted",),
    "private names": (
        "kernels/lorakit_kernels/training_ops.py: imports the private name _operation of lorakit_kernels.dispatch",
    ),
    "long files": ("tests/adapters/attach/test_rows.py: is longer than 400 lines",),
    "full folders": (
        "lorakit/adapters: has more than 15 files",
        "lorakit/inspection: has more than 15 files",
        "lorakit/layers: has more than 15 files",
        "lorakit/models: has more than 15 files",
        "tests/adapters: has more than 15 files",
        "tests/models: has more than 15 files",
        "tests/peers: has more than 15 files",
    ),
    "arguments": (
        "kernels/lorakit_kernels/cpu/__init__.py: dequantize_4bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/cpu/__init__.py: adamw_8bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/cpu/arguments.py: weight takes more than 6 positional arguments",
        "kernels/lorakit_kernels/cpu/linear.py: linear_4bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/cpu/linear.py: linear_4bit_dx takes more than 6 positional arguments",
        "kernels/lorakit_kernels/cpu/linear.py: add_linear_4bit_dx takes more than 6 positional arguments",
        "kernels/lorakit_kernels/cpu/linear.py: _accumulate takes more than 6 positional arguments",
        "kernels/lorakit_kernels/reference.py: dequantize_4bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/reference.py: linear_4bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/reference.py: linear_4bit_dx takes more than 6 positional arguments",
        "kernels/lorakit_kernels/reference.py: add_linear_4bit_dx takes more than 6 positional arguments",
        "kernels/lorakit_kernels/reference_training.py: adamw takes more than 6 positional arguments",
        "kernels/lorakit_kernels/reference_training.py: adamw_8bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/adamw.py: adamw_8bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/dequantize.py: dequantize_4bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/linear.py: linear_4bit takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/linear.py: linear_4bit_dx takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/linear.py: add_linear_4bit_dx takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/linear.py: _weight takes more than 6 positional arguments",
        "kernels/lorakit_kernels/triton/quantize.py: _launch takes more than 6 positional arguments",
        "lorakit/adapters/attach/add.py: add_adapter takes more than 6 positional arguments",
        "lorakit/adapters/merging/report.py: measure takes more than 6 positional arguments",
        "lorakit/adapters/load_save.py: load_adapter takes more than 6 positional arguments",
        "lorakit/cli/app.py: quantize takes more than 6 positional arguments",
        "lorakit/cli/app.py: plan takes more than 6 positional arguments",
        "lorakit/cli/generate.py: generate takes more than 6 positional arguments",
        "lorakit/cli/inspect.py: inspect takes more than 6 positional arguments",
        "lorakit/cli/merge.py: merge takes more than 6 positional arguments",
        "lorakit/inspection/quantization_view.py: quantization_view takes more than 6 positional arguments",
        "lorakit/layers/adapted.py: add takes more than 6 positional arguments",
        "lorakit/models/cache.py: __init__ takes more than 6 positional arguments",
        "lorakit/models/generate.py: generate takes more than 6 positional arguments",
        "lorakit/models/load.py: load_model takes more than 6 positional arguments",
        "lorakit/quantization/weight.py: assemble takes more than 6 positional arguments",
        "lorakit/runs/run.py: evaluate takes more than 6 positional arguments",
        "lorakit/training/trainer.py: train takes more than 6 positional arguments",
        "lorakit/training/trainer.py: _train takes more than 6 positional arguments",
    ),
    "names with two meanings": (
        "lorakit/inspection/updates.py: class Update is in lorakit/adapters/merging/weights.py too",
        "kernels/lorakit_kernels/triton/linear.py: class Weight is in kernels/lorakit_kernels/cpu/arguments.py too",
    ),
    "docstrings": (
        "lorakit/models/tokenizer.py: Tokenizer.vocab_size has no docstring",
        "lorakit/models/tokenizer.py: Tokenizer.chat_template has no docstring",
    ),
    "shapes": (
        "kernels/lorakit_kernels/cpu/arguments.py: source states no shape",
        "kernels/lorakit_kernels/cpu/arguments.py: at_most states no shape",
        "kernels/lorakit_kernels/cpu/arguments.py: readable states no shape",
        "kernels/lorakit_kernels/cpu/arguments.py: writable states no shape",
        "kernels/lorakit_kernels/cpu/arguments.py: weight states no shape",
        "kernels/lorakit_kernels/cpu/elementwise.py: swiglu_backward states no shape",
        "kernels/lorakit_kernels/cpu/workspace.py: workspace states no shape",
        "kernels/lorakit_kernels/dispatch.py: dequantize_4bit_out states no shape",
        "kernels/lorakit_kernels/reference.py: unpack_4bit states no shape",
        "kernels/lorakit_kernels/reference_training.py: swiglu_backward states no shape",
        "kernels/lorakit_kernels/training_ops.py: swiglu_backward states no shape",
        "kernels/lorakit_kernels/triton/arguments.py: readable states no shape",
        "kernels/lorakit_kernels/triton/arguments.py: readable_nested states no shape",
        "kernels/lorakit_kernels/triton/arguments.py: words_of states no shape",
        "kernels/lorakit_kernels/triton/arguments.py: at_most states no shape",
        "kernels/lorakit_kernels/triton/launch.py: on_device_of states no shape",
        "kernels/lorakit_kernels/triton/linear.py: Weight.pointers states no shape",
        "kernels/lorakit_kernels/triton/swiglu.py: swiglu_backward states no shape",
        "kernels/lorakit_kernels/triton/tune.py: tune states no dtype",
        "lorakit/adapters/attach/add.py: add_adapter states no shape",
        "lorakit/adapters/starts/__init__.py: find_init states no shape",
        "lorakit/adapters/starts/eva.py: eva states no shape",
        "lorakit/adapters/starts/lora_ga.py: lora_ga states no shape",
        "lorakit/adapters/merging/modules.py: dense_linear states no shape",
        "lorakit/adapters/merging/report.py: share_of states no shape",
        "lorakit/adapters/merging/weights.py: merged_dense states no shape",
        "lorakit/adapters/merging/weights.py: merged_4bit states no shape",
        "lorakit/adapters/merging/weights.py: quantized states no shape",
        "lorakit/adapters/merging/weights.py: quantized_like states no shape",
        "lorakit/adapters/load_save.py: write_peft_folder states no shape",
        "lorakit/adapters/peft_keys.py: file_tensors states no shape",
        "lorakit/adapters/peft_keys.py: write_tensors states no shape",
        "lorakit/adapters/combining/ranks.py: rank_for_energy states no shape",
        "lorakit/adapters/combining/resize.py: chosen_ranks states no shape",
        "lorakit/inspection/probes/matrices.py: Adapted.singular_values states no shape",
        "lorakit/inspection/probes/matrices.py: norms states no shape",
        "lorakit/inspection/singular_vectors.py: complete_vectors states no shape",
        "lorakit/inspection/spectrum.py: effective_rank states no shape",
        "lorakit/inspection/spectrum.py: stable_rank states no shape",
        "lorakit/inspection/spectrum.py: numerical_rank states no shape",
        "lorakit/inspection/spectrum.py: energy states no shape",
        "lorakit/layers/lora_linear.py: linear_together states no shape",
        "lorakit/layers/frozen/quantized_module.py: frozen states no shape",
        "lorakit/layers/saved_module.py: SavedModule.weight states no shape",
        "lorakit/layers/trained_tokens.py: TiedHead.forward states no shape",
        "lorakit/layers/variants/dora.py: DoRA.start states no shape",
        "lorakit/layers/variants/lora_bias.py: LoRABias.start states no shape",
        "lorakit/layers/variants/residual.py: Residual.start states no shape",
        "lorakit/layers/variants/residual.py: Residual.update states no shape",
        "lorakit/layers/variants/variant.py: Variant.start states no shape",
        "lorakit/layers/variants/variant.py: Variant.update states no shape",
        "lorakit/models/checkpoint.py: Checkpoint.read states no shape",
        "lorakit/models/decoder.py: Attention.forward states no shape",
        "lorakit/models/decoder.py: MLP.forward states no shape",
        "lorakit/models/decoder.py: DecoderLayer.forward states no shape",
        "lorakit/models/gguf_file.py: GGUFFile.read states no shape",
        "lorakit/models/prequantized.py: stream_stored states no shape",
        "lorakit/models/recompute.py: recomputed states no shape",
        "lorakit/models/safetensors_header.py: read_tensors states no shape",
    ),
}

ROOT = Path(__file__).parents[1]
PYTHON = (".py",)
SOURCES = (".py", ".cpp", ".h")


@cache
def sources(roots: tuple[str, ...], suffixes: tuple[str, ...] = PYTHON) -> dict[str, str]:
    """Return path -> text of the files below some folders."""
    files = sorted(file for root in roots for file in (ROOT / root).rglob("*") if file.suffix in suffixes)
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


LIBRARY, CODE, ALL = ("lorakit", "kernels"), ("lorakit", "kernels", "bench"), ("lorakit", "kernels", "bench", "tests")


def breaches(rule: str) -> Iterator[Breach]:
    """Apply a rule to the tree."""
    library, code, every = sources(LIBRARY), sources(CODE), sources(ALL, SOURCES)
    return {
        "floors": lambda: floor_breaches(code, FLOORS),
        "rooms": lambda: room_breaches(code, ROOMS),
        "circles": lambda: circle_breaches(code, LATE_IMPORTS),
        "private names": lambda: private_breaches(code),
        "long files": lambda: length_breaches(every, MOST_LINES),
        "full folders": lambda: folder_breaches(every, MOST_FILES),
        "arguments": lambda: argument_breaches(code, MOST_ARGUMENTS, REGISTRATION),
        "names with two meanings": lambda: twice_defined_breaches(library, SAME_NAMES),
        "docstrings": lambda: missing_breaches(library),
        "shapes": lambda: shape_breaches(library, WITH_DTYPES, DEFINITIONS),
    }[rule]()


RULES = (
    "floors", "rooms", "circles", "private names", "long files", "full folders", "arguments",
    "names with two meanings", "docstrings", "shapes",
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps(rule: str) -> None:
    known = KNOWN_BREACHES.get(rule, ())
    new = [str(breach) for breach in breaches(rule) if breach.key not in known]
    assert not new, "\n".join([f"{rule}:", *new])


@pytest.mark.parametrize("rule", RULES)
def test_known_breaches_are_breaches_still(rule: str) -> None:
    mended = set(KNOWN_BREACHES.get(rule, ())) - {breach.key for breach in breaches(rule)}
    assert not mended, "\n".join([f"{rule}: take out of KNOWN_BREACHES, they are mended:", *sorted(mended)])


@pytest.mark.parametrize("path", PUBLIC)
def test_public_names(path: str) -> None:
    assert public_names((ROOT / path).read_text(encoding="utf-8")) == PUBLIC[path].split()


def test_the_tables_name_what_there_is() -> None:
    modules = {path.removeprefix("kernels/").removesuffix(".py").replace("/", ".") for path in sources(CODE)}
    packages = {module.removesuffix(".__init__") for module in modules}
    assert set(ROOMS) <= packages
    assert {importer for importer, _ in LATE_IMPORTS} <= packages
    assert set(KNOWN_BREACHES) <= set(RULES)
