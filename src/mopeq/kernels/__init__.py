"""Matrix products with packed weights. Kernels (interface.py) are behind one function, and ``naive`` defines correct:

``grouped_linear(x (rows, in), packed: PackedGroup, offsets (experts + 1,)) -> (rows, out)``: rows ``offsets[e]`` to
``offsets[e + 1]`` of ``x`` go through expert e; other rows belong to no expert and come out as zeros.
"""

from mopeq.kernels.cpu import convert
from mopeq.kernels.layout import Form, GroupLayout, PackedGroup
from mopeq.kernels.select import Ready, Selected, choose, experts, grouped_linear, linear, ready, selected, using

__all__ = [
    "Form",
    "GroupLayout",
    "PackedGroup",
    "Ready",
    "Selected",
    "choose",
    "convert",
    "experts",
    "grouped_linear",
    "linear",
    "ready",
    "selected",
    "using",
]
