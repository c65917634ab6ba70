"""The real VLMEvalKit through the native server (``make test-vlmeval``), beside the model in this process."""

# ruff: noqa: E402  (operators are named before what looks for them)

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vlmeval") is None:
    pytest.skip("VLMEvalKit is not installed; make test-vlmeval installs it apart", allow_module_level=True)

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # as in tests/evaluate/test_vlmevalkit.py
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        OPERATORS.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

import pandas as pd
from vlmeval.api import LMDeployAPI
from vlmeval.dataset import build_dataset
from vlmeval.inference import infer_data_job

from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.load import load_original, load_processor
from mopeq.runtime.generate import generate
from serving import serving

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_table_through_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bundled_images("heldout.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[:600:50]
    with (tmp_path / "held.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pair = load_original(bundled_vlm(), torch.float32), load_processor(bundled_vlm())
    sent: list[Any] = []

    class Recorded(LMDeployAPI):  # type: ignore[misc]
        def prepare_inputs(self, *arguments: Any) -> Any:
            sent.append(super().prepare_inputs(*arguments))
            return sent[-1]

    with serving(pair) as port:
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        model = Recorded(model="tiny", api_base=address, max_tokens=8, retry=1, wait=0)
        dataset = build_dataset("held")
        infer_data_job(model=model, work_dir=str(tmp_path), model_name="tiny", dataset=dataset, api_nproc=2)
    made = pd.read_excel(next(tmp_path.glob("tiny_held.*")), dtype=str)["prediction"].fillna("")
    wanted = [generate(*pair, messages(one), max_new_tokens=8).text.strip() for one in sent]
    assert len(made) == len(rows)
    assert sorted(made) == sorted(wanted)
    assert all(wanted)


def messages(sent: Any) -> Any:
    """What was sent, as mopeq's processors take it."""
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": part["image_url"]["url"]} if part["type"] == "image_url" else part
                for part in message["content"]
            ],
        }
        for message in sent
    ]


def teardown_module() -> None:
    torch.set_grad_enabled(True)  # the toolkit turns gradients off
