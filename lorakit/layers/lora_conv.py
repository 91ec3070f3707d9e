"""`LoRAConv`: a frozen convolution plus low-rank updates. A is a convolution to r channels, B a pointwise one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer
from .row_products import forward_by_rows


class LoRAConv(AdaptedLayer):
    """A frozen nn.Conv1d, Conv2d or Conv3d plus a trainable low-rank update.

        y = base(x) + scaling * B * (A * x),   * the convolutions

    A has the base's kernel size, stride, padding and dilation; B has a kernel of one point. As a matrix (out_channels,
    in_channels * points), the update of the kernel is therefore scaling * B @ A. Grouped convolutions are not adapted:
    their kernel is block-diagonal and the update would not be.

    Shapes:
        x and y as for the base; lora_A[name] (r, in_channels, *kernel_size); lora_B[name] (out_channels, r, 1, ...)
    """

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(base_layer, base_layer.weight[0].numel(), base_layer.out_channels)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """(in_channels, *kernel_size)."""
        return tuple(cast(Tensor, self.base_layer.weight).shape[1:])

    def matrix_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, *self.kernel), (self.out_features, r, *(1 for _ in self.kernel[1:]))

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.out_features, *self.kernel)

    def low_rank(self, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.base_layer)
        u = base._conv_forward(x, lora_a.to(x.dtype), None)  # the base's stride, padding and dilation
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.kernel) - 2]
        return convolve(u, lora_b.to(x.dtype))

    def apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.base_layer)
        y: Tensor = base._conv_forward(x, self.as_weight(matrix).to(x.dtype), None)
        return y

    def along_output(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.kernel[1:]))

    def made_up_input(self, generator: torch.Generator) -> Tensor:
        base = cast(nn.Conv2d, self.base_layer)
        sizes = zip(base.kernel_size, base.dilation, base.stride, strict=True)
        extents = [dilation * (size - 1) + 1 + 2 * stride for size, dilation, stride in sizes]
        return torch.randn(2, base.in_channels, *extents, generator=generator)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs) if self.rows is None else forward_by_rows(self, *args, **kwargs)
