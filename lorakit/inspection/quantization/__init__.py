"""What 4 bits have done to the base weights, beside the adapter."""

from .quantization_view import LayerQuantization, QuantizationView, quantization_view

__all__ = ["LayerQuantization", "QuantizationView", "quantization_view"]
