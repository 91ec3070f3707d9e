"""A kill while one run takes the place of another leaves the one or the other, never a mixture of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.runs import load_recipe
from lorakit.runs.run import train_run

KILLED_AT_EACH = """
import os, shutil, signal, sys
from pathlib import Path
import lorakit.files as files
from lorakit.runs import load_recipe
from lorakit.runs.run import train_run

changed = ["eval=null", "data.eval=null", "train.lr=0.5", "train.checkpoint_every=1", "train.max_steps=2"]

def kill_at(number):
    count = 0
    def counted(real):
        def call(*args, **values):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **values)
        return call
    for module, names in ((os, ("replace", "link", "mkdir", "unlink", "rmdir")), (files, ("_exchanged",))):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))

def triple(folder):
    names = ("recipe.yaml", "adapter/adapter_model.safetensors", "metrics.json")
    def content(path):
        return path.read_bytes() if path.name != "metrics.json" else b"there"
    return [content(folder / name) if (folder / name).exists() else None for name in names]

load_recipe("recipe.yaml")
train_run(load_recipe("recipe.yaml", [*changed, "output=new"]), lambda line: None)
old, new = triple(Path("run")), triple(Path("new"))
new[0] = new[0].replace(b"output: new", b"output: run")
number = seen_old = seen_new = 0
while True:
    number += 1
    child = os.fork()
    if not child:
        kill_at(number)
        train_run(load_recipe("recipe.yaml", changed), lambda line: None, overwrite=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = triple(Path("run"))
    assert found in (old, new), (number, [a == b for a, b in zip(found, old)], [a == b for a, b in zip(found, new)])
    assert Path("run/mine.txt").read_text() == "mine", number
    seen_old, seen_new = seen_old + (found == old), seen_new + (found == new)
    if status == 0:
        break
    if found == new:  # begin from the old one again
        shutil.rmtree("run")
        shutil.copytree("old", "run")
assert found == new, (number, seen_old, seen_new)
left = [path.name for path in Path().iterdir() if path.name.startswith(".")]
assert left == [], left
print(number, seen_old, seen_new)
"""


@pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="forks, and exchanges names in one step"
)
def test_a_kill_at_any_operation_on_files_leaves_the_old_run_or_the_new(workshop: Path) -> None:
    train_run(load_recipe("recipe.yaml", ["eval=null", "data.eval=null"]), lambda line: None)
    Path("run/mine.txt").write_text("mine")
    shutil.copytree("run", "old")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["OMP_NUM_THREADS"] = "1"  # a forked process lacks its parent's threads, and would wait for them
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EACH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    number, old, new = map(int, done.stdout.split())
    assert number > 20 and old > 20 and new > 1
