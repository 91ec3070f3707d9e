"""The Trainer of docs/how-to/transformers-trainer.md: its checkpoints are adapters, and a resumed run is the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorakit as lk

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "transformers-trainer.md"
QWEN = tf.Qwen3Config(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48,
)  # fmt: skip


def from_page() -> Any:
    """The class on the page."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    return names["AdapterTrainer"]


def base() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = tf.Qwen3ForCausalLM(QWEN)
    return model


def attached(**settings: Any) -> nn.Module:
    model = base()
    torch.manual_seed(1)
    lk.add_adapter(model, lk.LoraConfig(**{"r": 4, "lora_dropout": 0.1} | settings))
    return model


def data() -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    rows = torch.randint(0, 60, (12, 9))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: nn.Module, folder: Path, **settings: Any) -> Any:
    arguments = tf.TrainingArguments(
        str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_steps=1, **settings,
    )  # fmt: skip
    return from_page()(model, arguments, train_dataset=data(), eval_dataset=data()[:4])


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "use_dora": True}]
)
def test_checkpoints_are_adapters_and_a_resumed_run_is_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = attached(**settings)
    trainer(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not list(checkpoint.rglob("model*.safetensors"))
    assert {file.name for file in (checkpoint / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    for other in ("checkpoint-3", "checkpoint-6"):
        lk.load_adapter(base(), tmp_path / "whole" / other)

    resumed = attached(**settings)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = lk.adapter_parameters(resumed), lk.adapter_parameters(whole)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    model = peft.PeftModel.from_pretrained(base(), checkpoint.parent / "checkpoint-6" / "adapter").eval()
    ids = data()[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)


def test_the_best_adapter_and_the_last_one(tmp_path: Path) -> None:
    model = attached()
    run = trainer(model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    run.train()
    run.save_model()
    best = base()
    lk.load_adapter(best, run.state.best_model_checkpoint)
    last = base()
    lk.load_adapter(last, tmp_path / "adapter")
    for other in (best, last):
        found, expected = lk.adapter_parameters(other), lk.adapter_parameters(model)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
