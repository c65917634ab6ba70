"""Packed folders for runtimes that do not know mopeq: compressed-tensors, AutoRound, GGUF, or dequantized.

Codes are never rounded again: a matrix is stored in a field that holds its integers exactly, or dequantized.
"""

from mopeq.export.price import Price, measured, priced
from mopeq.export.verb import FORMATS, Plan, plan_export, write_export

__all__ = ["FORMATS", "Plan", "Price", "measured", "plan_export", "priced", "write_export"]
