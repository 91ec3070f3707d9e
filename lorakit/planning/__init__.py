"""Planning: peak memory, FLOPs and cost of a training run, from config.json alone."""

from .flops import Flops
from .plan import plan
from .result import Cost, Plan, Suggestion
from .runtime import measure_flops, measure_runtime

__all__ = ["Cost", "Flops", "Plan", "Suggestion", "measure_flops", "measure_runtime", "plan"]
