"""Several quantized variants of one model behind a light router (MoQE, arXiv 2508.09204): docs/moqe.md.

::

    from mopeq import moqe

    moqe.build(MODEL, ["rtn-3bit", "gptq-3bit", "mixed-2.5"], "set")
    moqe.train("set", "text.jsonl")
    moqe.load("set", resident=2).generate("Once upon a time")
"""

from mopeq.moqe.judging import Judged, judge
from mopeq.moqe.language import train
from mopeq.moqe.make import build
from mopeq.moqe.model import Moqe, load
from mopeq.moqe.store import VariantSet, read_set
from mopeq.moqe.training import Settings, Trained

__all__ = ["Judged", "Moqe", "Settings", "Trained", "VariantSet", "build", "judge", "load", "read_set", "train"]
