"""Packed models at work: experts and linears that stay packed, their installation, generation."""

from mopeq.runtime.experts import MixedExperts
from mopeq.runtime.install import install, packed_modules
from mopeq.runtime.linear import QLinear

__all__ = ["MixedExperts", "QLinear", "install", "packed_modules"]
