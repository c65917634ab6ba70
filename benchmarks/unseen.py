"""What few bits cost on text of a kind that the calibration text does not have, experts left out or not.

Every domain's text is cut in three, as in ``moqe.py``: calibration takes 64 sequences of the first parts of all domains
or of all but one, and the last parts are judged, the same windows always. Maps are those of ``few_bits.py`` at 2.25
bits, and uniform 2 bits, whose codes are fitted to the calibration text too.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from common import arguments, kept_runs, run_of, settings_of, store
from few_bits import AT, COST, KEPT, OFFERED, TWO, measured
from fidelity import short
from mopeq.allocate import allocate, uniform_map
from mopeq.data.text import text_windows
from mopeq.evaluate.divergence import judging
from mopeq.journal import Journal
from mopeq.load import load_source
from mopeq.measure import Calibration, calibrated, open_model
from mopeq.precision import LEFT_OUT
from moqe import Text

MAPS = ("2, 3, 4", "0, 2, 3, 4", "0, 2c, 3, 4")


def main() -> None:
    parser = arguments(__doc__ or "", "unseen")
    parser.add_argument("--model", required=True, help="folder of the original")
    parser.add_argument("--label", default="", help="how results call the model")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="unseen text, one file a domain")
    parser.add_argument("--apart", nargs="+", required=True, help="domains to leave out of the calibration in turn")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, and of a held-out window")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of each domain")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(asked.model)
    settings = settings_of(asked)
    results = {**settings, "runs": kept_runs(asked.out, settings)}
    run = run_of(results, asked.seed)
    rows = run["rows"]
    original = load_source(opened.source, torch.float32)
    with tempfile.TemporaryDirectory() as temporary:
        text = Text(Path(temporary), asked.text)
        for apart in ("", *asked.apart):
            if any(row["apart"] == apart for row in rows):
                continue
            file = Path(temporary) / f"without-{apart}.jsonl"
            texts = [t for domain, found in text.parts["calibrate"].items() if domain != apart for t in found]
            file.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
            calibration = Calibration(str(file), asked.samples, asked.length, 8, asked.seed, cost_share=1.0)
            ready = calibrated(opened, calibration)
            windows, ends = [], {}
            for domain, found in text.parts["judge"].items():
                made = text_windows(found, ready.tokenizer, asked.length, limit=asked.windows)
                ends[domain] = slice(len(windows), len(windows) + len(made))
                windows += made
            folder = Path(temporary) / f"kept-{apart}"
            folder.mkdir()
            with Journal(folder, {}) as journal, judging(original, windows, cache=folder, batch_size=8) as judge:
                stats, trial = measured(ready, original, journal, asked.seed)
                maps = {"uniform 2": uniform_map(opened.inventory, [TWO], rest=KEPT)}
                for name in MAPS:
                    maps[name] = allocate(stats, budget=f"{AT}bpw", cost=COST, options=OFFERED[name], rest=KEPT)
                judged = []
                for name, precisions in maps.items():
                    seen = judge(trial.take(precisions), name).divergence
                    each = [short(v / n) for v, n in zip(seen.window_kl, seen.window_tokens, strict=True)]
                    left_out = sum(p == LEFT_OUT for row in precisions.experts["down"].values() for p in row)
                    judged.append({
                        "apart": apart, "name": name, "bytes": opened.inventory.total_bytes(precisions),
                        "left_out": left_out, "window_kl": {domain: each[at] for domain, at in ends.items()},
                    })  # fmt: skip
                    print(time.strftime("%H:%M:%S"), apart, name, short(seen.kl.value), flush=True)
            rows += judged
            store(asked.out, results)


if __name__ == "__main__":
    main()
