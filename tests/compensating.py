"""How much nearer --compensate brings a tiny model to its original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mopeq.analyze.forward import inputs_of, token_mask
from mopeq.load import load, load_original
from mopeq.measure import Calibration, calibrated, open_model
from mopeq.precision import Precision
from mopeq.quantize import quantize


def nearer(folder: Path, calibration: Calibration, tmp_path: Path, **how: Any) -> float:
    """Squared error of the logits of the calibration tokens with --compensate over that without, in the same bytes."""
    batches, original = calibrated(open_model(folder), calibration).batches, load_original(folder, dtype=torch.float32)
    errors, how = [], how or {"uniform": Precision(2, 32)}
    for way in (False, True):
        out = tmp_path / str(way)
        quantize(folder, out, **how, calibration=calibration, compensate=way, evaluated=False)
        small, error = load(out, dtype=torch.float32), 0.0
        for batch in batches:
            inputs = inputs_of(batch, torch.device("cpu"))
            with torch.no_grad():
                gap = small(**inputs, use_cache=False).logits - original(**inputs, use_cache=False).logits
            error += float(gap[token_mask(batch)].square().sum())
        errors.append(error)
    return errors[1] / errors[0]
