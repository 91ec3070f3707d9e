"""The quantization error of the base weights, beside the adapter."""

from .quantization_view import LayerQuantization, QuantizationView, quantization_view

__all__ = ["LayerQuantization", "QuantizationView", "quantization_view"]
