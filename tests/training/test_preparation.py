"""Before the first step: tokens without a row, room on the disk, one process a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made import adapted, small_decoder, small_tokenizer
from small_training import CONVERSATIONS, config
from torch import nn

from lorakit import LoraConfig, Tokenizer, add_adapter, train
from lorakit.errors import DataError, StorageError
from lorakit.locks import locked
from lorakit.training.optimizers.build import build_optimizer
from lorakit.training.preparation import fingerprint_of, vocabulary_rows


@pytest.fixture
def tok(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer").mkdir()
    return small_tokenizer(tmp_path / "tokenizer")


def test_tokens_without_a_row_are_named_before_anything_happens(tok: Tokenizer, tmp_path: Path) -> None:
    model = small_decoder(vocab_size=386)  # without <|endoftext|>, <|im_start|> and <|im_end|>
    add_adapter(model, LoraConfig(r=1))
    with pytest.raises(DataError, match=r"embedding has 386 rows.*: train.jsonl:1 \(token 388\), train.jsonl:2 \("):
        train(model, tok, CONVERSATIONS[:4], config(output=tmp_path / "run"), CONVERSATIONS)
    assert not (tmp_path / "run").exists()


def test_the_rows_of_a_model_are_those_below_its_adapter() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(17, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.wte

    model = Other()
    assert vocabulary_rows(model) == 17
    add_adapter(model, LoraConfig(r=2, target_modules=["wte"]))
    assert vocabulary_rows(model) == 17
    assert vocabulary_rows(nn.Linear(2, 2)) == float("inf")


@pytest.mark.parametrize(("every", "fits"), [(None, True), (2, False)])
def test_the_disk_has_room_for_the_checkpoints(
    every: int | None, fits: bool, tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    free = 7 * adapter  # a checkpoint has the parameters and two moments; two of them are on the disk for a moment
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    settings = config(output=tmp_path / "run", checkpoint_every=every)
    assert (every is None) == fits
    if fits:
        train(model, tok, CONVERSATIONS, settings)
        return
    with pytest.raises(StorageError, match=r"bytes are needed"):
        train(model, tok, CONVERSATIONS, settings)
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_train_into_one_folder(tok: Tokenizer, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StorageError, match="written by another process"):
        train(adapted(), tok, CONVERSATIONS, config(output=tmp_path))
    train(adapted(), tok, CONVERSATIONS, config(output=tmp_path))


def test_a_run_is_told_by_names_and_values_not_by_where_its_files_are(tok: Tokenizer) -> None:
    def fingerprint(**changes: object) -> dict[str, object]:
        model, settings = adapted(), config(**changes)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return fingerprint_of(settings, build_optimizer(parameters, settings), [], model, parameters)

    first = fingerprint()
    assert fingerprint(output=Path("elsewhere"), progress=True, checkpoint_every=3) == first
    changed = fingerprint(lr=1.0)
    assert {key for key in first if first[key] != changed[key]} == {"lr"}
