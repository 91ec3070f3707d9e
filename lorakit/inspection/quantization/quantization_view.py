"""The quantization error of each weight, and whether the adapter learns the task or repairs that error.

    view = quantization_view(model)            # a 4-bit model that knows the 16-bit folder it was loaded from
    print(*view.findings(), sep="\\n")

The error of a weight is E = Q(W) - W. An adapter that repairs it has an update D near -E. E is almost noise, of full
rank: rank r can remove at most the energy of its r leading singular values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...adapters import adapter_configs
from ...adapters.attach.state import check_adapter
from ...adapters.attach.targeting import linear_layers
from ...adapters.attach.wrappers import named_modules
from ...adapters.low_rank import LowRank
from ...errors import CheckpointError
from ...layers.adapted import AdaptedLayer
from ...layers.frozen.quantized_module import QuantizedModule
from ...models.decoder.decoder import Decoder
from ...printed import Printed
from ...quantization import QuantizationError, QuantizedWeight, quantize
from ..measure.base_weights import BaseWeights
from ..measure.singular_vectors import EXACT_UP_TO, LEADING, leading_vectors
from ..tables import Tidy
from .code_use import CodeUse, code_use, distance, entropy

OUTLIER = 6.0  # standard deviations of the layer's weights; of five layers of 10^8 normal ones, one has a weight beyond
REPAIR, PARTLY = 0.5, 0.1  # alignment from which an update repairs, or partly repairs
CHANCE = 5.0  # times the deviation of a random update's cosine, below which an alignment says nothing


@dataclass(frozen=True)
class WorstPart:
    """A row or a block of a weight.

    Attributes:
        index: of the row, or of the block in the flat weight.
        start: (row, column) of its first element.
        relative_error: its ‖E‖ / ‖W‖; inf if only zeros became something else.
        share: its share of the whole weight's squared error.
    """

    index: int
    start: tuple[int, int]
    relative_error: float
    share: float


@dataclass(frozen=True)
class Outliers:
    """Weights beyond `OUTLIER` standard deviations: each makes its whole block coarse.

    Attributes:
        count: number of outliers.
        blocks: number of blocks with outliers.
        error_share: share of the squared error in those blocks.
        largest: (row, column, weight) of the largest outliers.
    """

    count: int
    blocks: int
    error_share: float
    largest: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Repair:
    """How an update D relates to the error E.

    Attributes:
        cosine: <D, -E> / (‖D‖ ‖E‖).
        best_cosine: the greatest cosine that an update of its rank could have.
        repaired: share of ‖E‖² that D removes, 1 - ‖E + D‖² / ‖E‖²; negative if it adds to the error.
        repairable: the greatest share that rank r could remove.
        chance: the deviation of a random update's cosine, 1 / sqrt(elements).
    """

    cosine: float
    best_cosine: float
    repaired: float
    repairable: float
    chance: float

    @property
    def alignment(self) -> float:
        """cosine / best_cosine: 1 if the update points to the best repair of its rank."""
        return self.cosine / self.best_cosine if self.best_cosine else 0.0

    @property
    def verdict(self) -> Literal["repairs", "partly repairs", "learns the task"]:
        """What the update does, judged by its direction."""
        if self.alignment < PARTLY or self.cosine < CHANCE * self.chance:
            return "learns the task"
        return "repairs" if self.alignment >= REPAIR else "partly repairs"


@dataclass(frozen=True)
class LayerQuantization:
    """One quantized weight beside its source.

    Attributes:
        name: the layer's path.
        shape, quant_type, block_size: the weight's.
        error: SNR and related figures.
        worst_rows, worst_blocks: those with the largest relative error.
        outliers: the source's.
        singular_values: those of E; all of them, or only the leading ones if `spectrum_error` is not 0.
        spectrum_error: each value is within this of a true singular value of E, and not above its own.
        codes: how often each code is used, in ascending order of values.
        repair: how the adapter's update relates to E; None without an adapter on this layer, or with a zero update.
    """

    name: str
    shape: tuple[int, int]
    quant_type: str
    block_size: int
    error: QuantizationError
    worst_rows: tuple[WorstPart, ...]
    worst_blocks: tuple[WorstPart, ...]
    outliers: Outliers
    singular_values: tuple[float, ...]
    spectrum_error: float
    codes: tuple[CodeUse, ...]
    repair: Repair | None

    @property
    def code_entropy(self) -> float:
        """Information in a code, in bits, at most 4."""
        return entropy(self.codes)

    @property
    def code_distance(self) -> float:
        """Total variation between the weight's use of codes and that of normal weights, from 0 to 1."""
        return distance(self.codes)

    def row(self) -> dict[str, Any]:
        """Return the layer as one flat row of numbers and words."""
        columns = ("cosine", "best_cosine", "repaired", "repairable", "chance", "alignment", "verdict")
        repair = {column: None if self.repair is None else getattr(self.repair, column) for column in columns}
        return {
            "name": self.name, "quant_type": self.quant_type, "block_size": self.block_size, **asdict(self.error),
            "spectral_norm": self.singular_values[0] if self.singular_values else 0.0,
            "outliers": self.outliers.count, "outlier_blocks": self.outliers.blocks,
            "outlier_error_share": self.outliers.error_share, "code_entropy": self.code_entropy,
            "code_distance": self.code_distance, **repair,
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class QuantizationView(Printed, Tidy):
    """All quantized weights of a model beside their sources."""

    layers: tuple[LayerQuantization, ...]

    def __str__(self) -> str:
        return "\n".join([f"{len(self.layers)} quantized weights", *(f"- {finding}" for finding in self.findings())])

    def table(self) -> list[dict[str, Any]]:
        """Return one row per layer."""
        return [layer.row() for layer in self.layers]

    def findings(self) -> list[str]:
        """Return what stands out, in sentences."""
        return list(_findings(self.layers))


def quantization_view(
    model: nn.Module,
    source: str | os.PathLike[str] | nn.Module | None = None,
    adapter: str | None = None,
    layers: Iterable[str] | None = None,
    *,
    quant_type: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    top: int = 5,
) -> QuantizationView:
    """Compare each 4-bit weight of a model with the weight that it was made from; only one layer is dense at a time.

    Args:
        model: with 4-bit layers; or a 16-bit model, with `quant_type`, to see what quantizing would do.
        source: where the 16-bit weights are: a folder, a known model's name or a model; None: the folder that the
            model was loaded from, or the 16-bit model itself.
        adapter: the adapter whose update is compared with the error; None: the only one, if there is exactly one.
        layers: paths to examine; None: all.
        quant_type, block_size, double_quant: how to quantize the layers that are not in 4 bits; with None as
            quant_type they are left out.
        top: number of rows, blocks and outliers to name.

    Raises:
        AdapterError: the model has no such adapter.
        CheckpointError: there is no source, it is not the model's, or it holds the same 4-bit values.
    """
    if adapter is None and len(adapter_configs(model)) == 1:
        adapter = next(iter(adapter_configs(model)))
    if adapter is not None:
        check_adapter(model, adapter)
    chosen = None if layers is None else set(layers)
    weights: BaseWeights | None = None
    views = []
    for path, layer in _linear_layers(model, quant_type is not None):
        if chosen is not None and path not in chosen:
            continue
        base = layer.base_layer if isinstance(layer, AdaptedLayer) else layer
        if isinstance(base, QuantizedModule):
            weights = weights or BaseWeights(_source(model, source))
            weight, dense = base.quantized, weights.read(path)
        else:
            assert quant_type is not None and isinstance(base.weight, Tensor)
            weight, dense = quantize(base.weight, quant_type, block_size, double_quant), base.weight.detach()
        if weight.shape != dense.shape:
            raise CheckpointError(f"the source of {path} is {tuple(dense.shape)}, the weight {tuple(weight.shape)}")
        update = None
        if isinstance(layer, AdaptedLayer) and adapter in layer.names():
            update = _update(layer, adapter, weight.shape)
        views.append(measure_quantization(path, weight.to("cpu"), dense.cpu(), update, top))
    if views and all(view.error.max == 0 for view in views):
        raise CheckpointError("the source holds the same values as the 4-bit model; give the 16-bit folder as source")
    return QuantizationView(tuple(views))


@torch.no_grad()
def measure_quantization(
    name: str, weight: QuantizedWeight, source: Tensor, update: LowRank | None = None, top: int = 5
) -> LayerQuantization:
    """Compare one 4-bit weight (out, in) with its source, in float64.

    Args:
        source: (out, in), of any floating dtype.
        update: the adapter's, float64.
        top: number of rows, blocks and outliers to name.
    """
    error = weight.dequantize(torch.float32).double() - source.double()
    rank = 0 if update is None else min(update.rank, *update.shape)
    values, bound = _error_spectrum(error, max(LEADING, rank))
    starts = range(0, error.numel(), weight.block_size)
    return LayerQuantization(
        name, (error.shape[0], error.shape[1]), weight.quant_type, weight.block_size, weight.error(source),
        _worst(error, source, [row * error.shape[1] for row in range(len(error))], top),
        _worst(error, source, starts, top),
        _outliers(error, source.double(), weight.block_size, top),
        tuple(values.tolist()), bound, code_use(weight), _repair(error, values[:rank], update),
    )  # fmt: skip


def _error_spectrum(error: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the singular values of E, all from its smaller Gram matrix or only the leading ones, and their error."""
    if min(error.shape) <= max(EXACT_UP_TO, count):
        square = error @ error.T if error.shape[0] <= error.shape[1] else error.T @ error
        return torch.linalg.eigvalsh(square).flip(0).clamp(min=0).sqrt(), 0.0
    leading = leading_vectors(error, count)
    return leading.s, leading.error


def _squares(matrix: Tensor, size: int) -> Tensor:
    """Return the sums of squares of consecutive pieces of the flat matrix; the last piece may be shorter."""
    flat = matrix.double().reshape(-1).square()
    tail = len(flat) // size * size  # start of a shorter last piece
    sums = flat[:tail].view(-1, size).sum(1)
    return sums if tail == len(flat) else torch.cat([sums, flat[tail:].sum()[None]])


def _worst(error: Tensor, source: Tensor, starts: range | list[int], top: int) -> tuple[WorstPart, ...]:
    """Return the rows or blocks, given by their first elements, with the largest relative error."""
    size = starts[1] - starts[0] if len(starts) > 1 else error.numel()
    errors, norms = _squares(error, size), _squares(source, size)
    relative = torch.where(errors == 0, 0.0, (errors / norms).sqrt())
    total = float(errors.sum()) or 1.0
    indices = relative.topk(min(top, len(relative))).indices.tolist()
    width = error.shape[1]
    return tuple(
        WorstPart(index, divmod(starts[index], width), float(relative[index]), float(errors[index]) / total)
        for index in indices
    )


def _outliers(error: Tensor, source: Tensor, block_size: int, top: int) -> Outliers:
    flat = source.reshape(-1)
    outliers = (flat.abs() > OUTLIER * flat.std()).nonzero().flatten()  # indices in the flat weight
    blocks = (outliers // block_size).unique()
    errors = _squares(error, block_size)
    largest = outliers[flat[outliers].abs().topk(min(top, len(outliers))).indices].tolist()
    total = float(errors.sum()) or 1.0
    return Outliers(
        len(outliers), len(blocks), float(errors[blocks].sum()) / total,
        tuple((*divmod(index, source.shape[1]), float(flat[index])) for index in largest),
    )  # fmt: skip


def _update(layer: AdaptedLayer, adapter: str, shape: torch.Size) -> LowRank:
    """Return the low-rank update in the orientation that the layer stores its weight in."""
    up, down = (factor.detach().double().cpu() for factor in layer.factors(adapter))
    is_transposed = not layer.as_matrix(torch.empty(shape, device="meta")).is_contiguous()
    update = LowRank(up, down)
    return update.T if is_transposed else update


def _repair(error: Tensor, leading: Tensor, update: LowRank | None) -> Repair | None:
    if update is None:
        return None
    size, error_size = float(update.norm()), float(error.norm())
    if size == 0 or error_size == 0:
        return None
    dot = float(((update.up.T @ error) * update.down).sum())  # <D, E> without D
    repairable = float(leading.square().sum()) / error_size**2
    return Repair(
        cosine=-dot / (size * error_size),
        best_cosine=math.sqrt(repairable),
        repaired=-(2 * dot + size**2) / error_size**2,
        repairable=repairable,
        chance=1 / math.sqrt(error.numel()),
    )


def _linear_layers(model: nn.Module, dense_too: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and layer of those with a 4-bit weight, adapted or not, and on request of the dense linear ones."""
    adapted = {path: module for path, module in named_modules(model) if isinstance(module, AdaptedLayer)}
    inside = {layer.base_layer for layer in adapted.values()}
    dense = linear_layers(model) if dense_too else {}
    for path, module in named_modules(model):
        base = module.base_layer if path in adapted else module
        if module not in inside and (isinstance(base, QuantizedModule) or path in dense):
            yield path, module


def _source(model: nn.Module, source: str | os.PathLike[str] | nn.Module | None) -> str | os.PathLike[str] | nn.Module:
    if source is not None:
        return source
    if isinstance(model, Decoder) and model.folder is not None:
        return model.folder
    raise CheckpointError("the model does not know its source; give the folder of its 16-bit weights as source")


def _findings(layers: tuple[LayerQuantization, ...]) -> Iterator[str]:
    if not layers:
        return
    worst = min(layers, key=lambda layer: layer.error.snr_db)
    mean = sum(layer.error.snr_db for layer in layers) / len(layers)
    yield (
        f"{len(layers)} weights in 4 bits, {mean:.1f} dB SNR on average; "
        f"the worst is {worst.name} with {worst.error.snr_db:.1f}"
    )
    coarse = [
        layer for layer in layers if layer.outliers.error_share > 2 * _block_share(layer) and layer.outliers.count
    ]
    if coarse:
        most = max(coarse, key=lambda layer: layer.outliers.error_share)
        yield (
            f"outliers make blocks coarse in {len(coarse)} of them, most in {most.name}: {most.outliers.blocks} blocks "
            f"of {_blocks(most)} hold {most.outliers.error_share:.1%} of its squared error"
        )
    compared = [layer for layer in layers if layer.repair is not None]
    for verdict in ("repairs", "partly repairs"):
        names = [layer.name for layer in compared if layer.repair and layer.repair.verdict == verdict]
        if names:
            yield f"the adapter {verdict} the quantization error in {len(names)} layers: {', '.join(names[:5])}"
    if compared and all(layer.repair and layer.repair.verdict == "learns the task" for layer in compared):
        yield f"the adapter learns the task: its update points against the error in none of {len(compared)} layers"


def _blocks(layer: LayerQuantization) -> int:
    return -(-math.prod(layer.shape) // layer.block_size)


def _block_share(layer: LayerQuantization) -> float:
    return layer.outliers.blocks / _blocks(layer)
