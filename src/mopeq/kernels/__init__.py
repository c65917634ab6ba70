"""Matrix products with packed weights. A kernel is one function, and ``naive`` is the definition of correct:

``grouped_linear(x (rows, in), packed: PackedGroup, offsets (experts + 1,)) -> (rows, out)``: rows ``offsets[e]`` to
``offsets[e + 1]`` of ``x`` go through expert e; other rows belong to no expert and come out as zeros.
"""

from mopeq.kernels.cpu import convert
from mopeq.kernels.layout import Form, GroupLayout, PackedGroup
from mopeq.kernels.select import Selected, experts, grouped_linear, linear, selected, using

__all__ = [
    "Form",
    "GroupLayout",
    "PackedGroup",
    "Selected",
    "convert",
    "experts",
    "grouped_linear",
    "linear",
    "selected",
    "using",
]
