"""PEFT's name of a model's task. PEFT wraps the model in a class of that task, which passes that task's arguments on.

With a wrong task, PEFT cannot call the model. Without one it passes on all arguments as they are, so a model that no
task fits is given none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import nn

from ...models.decoder.decoder import Decoder
from ..attach.wrappers import is_a
from ..config import Task

# End of a class's name -> its task, and the heads that PEFT trains and saves in full for it.
_HEADS: dict[str, tuple[Task, tuple[str, ...]]] = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
_ARGUMENTS = {"input_ids", "attention_mask", "inputs_embeds"}  # that PEFT's class of any task passes on
_OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


def task_type(model: nn.Module, adapted: Iterable[str]) -> Task | None:
    """Return the task of a model, lorakit's or one of transformers, or None.

    Args:
        adapted: paths of the layers with low-rank updates. PEFT does not adapt layers inside a task's head, so with an
            adapter there the model is given no task.
    """
    if isinstance(model, Decoder):
        return "CAUSAL_LM"
    arguments = inspect.signature(model.forward).parameters.keys()
    if not is_a(type(model), "PreTrainedModel") or not arguments >= _ARGUMENTS or arguments & _OTHER_INPUTS:
        return None
    names = [kind.__name__ for kind in type(model).__mro__]
    for ending, (task, heads) in _HEADS.items():
        if any(name.endswith(ending) for name in names):
            has_head = any(name in model._modules for name in heads)
            return task if has_head and not any(path.split(".")[0] in heads for path in adapted) else None
    if getattr(model.config, "is_encoder_decoder", False) and model.get_output_embeddings() is not None:  # type: ignore[operator]
        return "SEQ_2_SEQ_LM"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if names[0].endswith("Model") else None
