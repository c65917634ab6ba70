"""A mopeq checkpoint, or its original, as a model of VLMEvalKit, for benchmarks that mopeq does not score itself.

    python -m mopeq.evaluate.vlmevalkit DIR --data MMBench_DEV_EN

asks and scores by the toolkit (https://github.com/open-compass/VLMEvalKit, ``pip install ms-vlmeval`` or its own
checkout), whose ``LMUData`` names the folder of tables; a table there that it does not know works too. In the toolkit's
own ``run.py``, ``vlmeval.config.supported_VLM["mopeq"] = partial(Mopeq, model_path=DIR)`` does the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel

from mopeq.errors import InputError
from mopeq.load import is_packed, load, load_original, load_processor
from mopeq.runtime.generate import generate

__all__ = ["Mopeq", "main"]


class Mopeq(BaseModel):  # type: ignore[misc]
    """What the toolkit calls ``generate`` of: images and texts in order are one message, answered greedily.

    model_path: folder or hub id, packed or not. device: where to; None is the CPU. max_new_tokens: of an answer.
    """

    INTERLEAVE = True

    def __init__(self, model_path: str, device: str | None = None, max_new_tokens: int = 200, **unused: Any) -> None:
        super().__init__()
        self.processor = load_processor(model_path)
        self.model = (load if is_packed(model_path) else load_original)(model_path, device=device)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to ``[{"type": "image" | "text", "value": ...}, ...]``."""
        keys = {"image": "path", "text": "text"}
        parts = [{"type": part["type"], keys[part["type"]]: part["value"]} for part in message]
        said = [{"role": "user", "content": parts}]
        return generate(self.model, self.processor, said, max_new_tokens=self.max_new_tokens).text


def main(arguments: Sequence[str] | None = None) -> Any:
    """Answer and score one of the toolkit's benchmarks without a judge model; returns what it makes of the answers."""
    from vlmeval.dataset import build_dataset
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path

    p = argparse.ArgumentParser(prog="python -m mopeq.evaluate.vlmevalkit", description=main.__doc__)
    p.add_argument("model", metavar="MODEL", help="a packed folder, or an original model")
    p.add_argument("--data", required=True, help="the toolkit's name of a benchmark, or of a table in LMUData")
    p.add_argument("--work-dir", default="outputs", help="for answers and scores (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    p.add_argument("--max-new-tokens", type=int, default=200, help="of an answer (default: %(default)s)")
    options = p.parse_args(arguments)
    dataset = build_dataset(options.data)
    if dataset is None:
        raise InputError(f"VLMEvalKit has no benchmark or table {options.data}; expected one of its names")
    model = Mopeq(options.model, options.device, options.max_new_tokens)
    name, folder = Path(options.model).resolve().name, Path(options.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    infer_data_job(model=model, work_dir=str(folder), model_name=name, dataset=dataset)
    answers = get_pred_file_path(str(folder), name, dataset.dataset_name, use_env_format=True)
    found = dataset.evaluate(answers, model="exact_matching")
    print(found)
    return found


if __name__ == "__main__":
    main()
