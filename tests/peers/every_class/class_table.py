"""The page docs/reference/transformers-classes.md: which of transformers' classes were checked, and what came out.

Run as: python tests/peers/every_class/class_table.py    checks every class that has a small config, and writes the page
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from pathlib import Path

import transformers

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

from class_checks import check  # noqa: E402
from small_models import TASKS, ModelClass, classes  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "transformers-classes.md"
_HEAD = """# Classes of transformers

Each class below was built with a small config and random weights (transformers {version}), and checked in fp32:

- an adapter with B = 0 on the default targets leaves every logit as it is, bit for bit;
- a random adapter gives PEFT's logits for the same files, to 1e-5 of the largest logit;
- saved and loaded again, it gives the same bits; merged, the same logits to 1e-4; unmerged, the same bits, and every
  weight is as before;
- a training step gives the adapter gradients and changes nothing else;
- transformers' `Trainer` takes a step and writes a checkpoint.

"right" means all of this. What follows it was left out, and why. `make grid` checks the table again, which takes about
three minutes; `make test-peers` checks a tenth of it. Classes without a small config in
`tests/peers/every_class/small_models.py` were not checked.

{right} of {count} classes are right; lorakit refuses the others, if any, and names the module.

| task | class | outcome |
|---|---|---|
"""


def read_page() -> dict[str, str]:
    """Return class -> outcome, from the page."""
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {row[2].strip(" `"): row[3].strip() for row in rows if row[1].strip() in TASKS}


def outcome(kind: ModelClass) -> str:
    """Return what `check` returns, as a cell of the table."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return check(kind).replace("|", "\\|")


def main() -> None:
    """Check all classes, and write the page; a class that cannot be built or gives no logits here is left out."""
    transformers.logging.set_verbosity_error()
    rows, wrong = [], []
    for kind in classes():
        try:
            model = kind.build()
            assert model(**kind.inputs(model)).logits.isfinite().all()
        except Exception:  # whatever a config that does not fit a class leads to
            continue
        try:
            rows.append((kind, outcome(kind)))
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
        print(".", end="", flush=True)
    print()
    if wrong:
        sys.exit("\n".join(wrong))
    right = sum(text.startswith("right") for _, text in rows)
    head = _HEAD.format(version=transformers.__version__, right=right, count=len(rows))
    lines = [f"| {kind.task} | `{kind}` | {text} |" for kind, text in rows]
    PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
