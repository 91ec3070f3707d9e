"""PEFT's name of a model's task. PEFT wraps the model in a class of that task, which passes that task's arguments on.

With a wrong task, PEFT cannot call the model. Without one it passes on all arguments as they are, so a model that no
task fits is given none.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn

from ...models.decoder.decoder import Decoder
from ..attach.wrappers import is_a
from ..config import TASK_HEADS, Task

# End of a class's name -> its task.
_WITH_HEADS: dict[str, Task] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_ARGUMENTS = {"input_ids", "attention_mask", "inputs_embeds"}  # that PEFT's class of any task passes on
_OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


def task_type(model: nn.Module, saved: Collection[str]) -> Task | None:
    """Return the task of a model, lorakit's or one of transformers, or None.

    Args:
        saved: paths of the modules that the adapter saves in full. PEFT expects the head of some tasks among them.
    """
    if isinstance(model, Decoder):
        return "CAUSAL_LM"
    arguments = inspect.signature(model.forward).parameters.keys()
    if not is_a(type(model), "PreTrainedModel") or not arguments >= _ARGUMENTS or arguments & _OTHER_INPUTS:
        return None
    names = [kind.__name__ for kind in type(model).__mro__]
    for ending, task in _WITH_HEADS.items():
        if any(name.endswith(ending) for name in names):
            present = [name for name in TASK_HEADS[task] if name in model._modules]
            return task if present and all(name in saved for name in present) else None
    if getattr(model.config, "is_encoder_decoder", False) and model.get_output_embeddings() is not None:  # type: ignore[operator]
        return "SEQ_2_SEQ_LM"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if names[0].endswith("Model") else None
