"""Packed models at work: experts and linears that stay packed, their installation, generation."""

from mopeq.runtime.experts import MixedExperts
from mopeq.runtime.install import install, packed_modules
from mopeq.runtime.linear import QLinear
from mopeq.runtime.packed import PackedModule, prepare

__all__ = ["MixedExperts", "PackedModule", "QLinear", "install", "packed_modules", "prepare"]
