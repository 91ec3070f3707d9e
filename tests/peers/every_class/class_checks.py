"""What is checked of every class: attach, compare with PEFT, save, load, merge, unmerge, train, use the Trainer."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from small_models import ModelClass
from torch import Tensor, nn

import lorakit as lk

Inputs = dict[str, Tensor]
TO_PEFT = 1e-5  # of the largest logit: the order of sums differs
# PEFT loses an adapter on a layer of which the model reads the weight, and calls a router as if it returned a tensor.
NOT_IN_PEFT = {
    "JambaForCausalLM": ["dt_proj"],
    "Llama4ForCausalLM": ["router"],
    "PhimoeForCausalLM": ["router"],
    "WavLMForCTC": ["k_proj", "out_proj", "q_proj", "v_proj"],
    "WavLMForSequenceClassification": ["k_proj", "out_proj", "q_proj", "v_proj"],
}
TO_MERGED = 1e-4  # one product with a rounded sum of weights instead of three products


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the logits, without a cache."""
    with torch.no_grad():
        return cast(Tensor, model(**inputs).logits)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a share of the largest value of b."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def same(what: str, got: Tensor, wanted: Tensor) -> None:
    """Raise AssertionError unless both are equal bit for bit."""
    assert torch.equal(got, wanted), f"{what}: differs by {distance(got, wanted):.1e}"


def near(what: str, got: Tensor, wanted: Tensor, bound: float) -> None:
    """Raise AssertionError unless both are equal to a share of the largest value."""
    assert distance(got, wanted) <= bound, f"{what}: differs by {distance(got, wanted):.1e}"


def check(kind: ModelClass) -> str:
    """Check a class; return "right" with remarks, or the refusal of lorakit with the module's name.

    Raises:
        AssertionError: a number is wrong.
        Exception: a crash.
    """
    base = kind.build()
    inputs = kind.inputs(base)
    expected = logits(base, inputs)
    same("the model alone, twice", logits(base, inputs), expected)
    try:
        with tempfile.TemporaryDirectory() as folder:
            remarks = _check_adapter(base, inputs, expected, Path(folder))
    except lk.LorakitError as refusal:
        return f"refused: {str(refusal).splitlines()[0]}"
    return "; ".join(["right", *filter(None, remarks)])


def _check_adapter(base: nn.Module, inputs: Inputs, expected: Tensor, folder: Path) -> list[str]:
    model = copy.deepcopy(base)
    lk.add_adapter(model, lk.LoraConfig(r=4))
    same("attached, B = 0", logits(model, inputs), expected)
    lk.remove_adapter(model)
    torch.manual_seed(2)
    lk.add_adapter(model, lk.LoraConfig(r=4, init_lora_weights=False))
    adapted = logits(model, inputs)
    assert distance(adapted, expected) > TO_MERGED, "the adapter has no effect"
    lk.save_adapter(model, folder / "adapter")
    remarks = [_check_peft(model, base, inputs, folder)]
    again = copy.deepcopy(base)
    lk.load_adapter(again, folder / "adapter")
    same("loaded again", logits(again, inputs), adapted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lk.merge_adapter(model)
    near("merged", logits(model, inputs), adapted, TO_MERGED)
    lk.unmerge_adapter(model)
    same("unmerged", logits(model, inputs), adapted)
    after = model.state_dict()
    assert before.keys() == after.keys(), "unmerging changed the state's names"
    for name, value in before.items():
        same(f"unmerged {name}", after[name], value)
    if not _trains(copy.deepcopy(base), inputs):
        return [*remarks, "PyTorch cannot differentiate the model itself"]
    _check_training(again, inputs, before)
    _check_trainer(copy.deepcopy(base), inputs, folder / "trainer")
    return remarks


def _check_peft(model: nn.Module, base: nn.Module, inputs: Inputs, folder: Path) -> str:
    """Compare with PEFT on the same adapter; return what PEFT leaves out.

    PEFT also takes the names of a mixture's old experts for the new ones, even in layers without experts.
    """
    names = NOT_IN_PEFT.get(type(model).__name__, [])
    if isinstance(getattr(model, "config", None), transformers.PreTrainedConfig):
        family = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
        names = names or list(_MOE_TARGET_MODULE_MAPPING.get(family, ()))
    remark = f"PEFT cannot adapt {', '.join(names)} here" if names else ""
    if names:
        model = copy.deepcopy(base)
        torch.manual_seed(3)
        lk.add_adapter(model, lk.LoraConfig(r=4, init_lora_weights=False, exclude_modules=names))
        lk.save_adapter(model, folder / "for_peft")
    file = folder / ("for_peft" if (folder / "for_peft").exists() else "adapter")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), file).eval()
        except ValueError as refusal:
            if "incompatible with Mamba" in str(refusal):  # for the sake of a GPU's kernel
                return "PEFT refuses it"
            raise
    if any("missing adapter keys" in str(warning.message) for warning in said):
        return "PEFT renames some modules and finds no tensors for them"
    near("PEFT with the same adapter", logits(model, inputs), logits(theirs, inputs), TO_PEFT)
    return remark


def _loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a loss for any task: a function of all logits, of a size near 1."""
    out = model(**inputs).logits.float()
    return cast(Tensor, (out / out.detach().abs().max()).pow(2).mean())


def _trains(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether the model without an adapter has gradients."""
    try:
        _loss(model.requires_grad_(True), inputs).backward()
    except RuntimeError:
        return False
    return True


def _check_training(model: nn.Module, inputs: Inputs, before: dict[str, Tensor]) -> None:
    """Take a step: the adapter moves, and nothing else."""
    lk.set_trained(model, "default")  # in eval mode: dropout draws no numbers, and running statistics stay
    parameters = list(lk.adapter_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    _loss(model, inputs).backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters), "no gradient"
    optimizer.step()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and all("lora_" in name for name in moved), f"training moved {moved[:3]}"


class _Trainer(transformers.Trainer):
    """The loss is a function of the logits, for any task."""

    def compute_loss(self, model: nn.Module, inputs: Inputs, **options: Any) -> Tensor:
        return _loss(model, inputs)


def _check_trainer(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    lk.add_adapter(model, lk.LoraConfig(r=4))
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=1, save_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    _Trainer(model, arguments, train_dataset=rows).train()
    assert list((folder / "checkpoint-1").glob("*.safetensors")), "the Trainer wrote no checkpoint"
