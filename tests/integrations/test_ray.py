"""The cluster's map against the local one, on a real Ray cluster of several node processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

ray = pytest.importorskip("ray")

import killing  # noqa: E402
import mopeq.integrations.ray as integration  # noqa: E402
from mopeq.analyze import Map, here  # noqa: E402
from mopeq.cli import main  # noqa: E402
from mopeq.errors import InputError, ModelError  # noqa: E402
from mopeq.integrations.ray import Cluster, cluster  # noqa: E402
from mopeq.measure import measure  # noqa: E402
from mopeq.precision import Precision  # noqa: E402
from mopeq.quantize import quantize  # noqa: E402
from tiny import rewrite, tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
Make = Callable[..., Path]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def begun(workers: int) -> Any:
    """A head that runs no items, on which the driver is, and nodes of one processor each."""
    from ray.cluster_utils import Cluster as Processes

    size = {"object_store_memory": 80 << 20, "include_dashboard": False}
    made = Processes(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    for _ in range(workers):
        made.add_node(num_cpus=1, object_store_memory=80 << 20)
    made.wait_for_nodes()
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two() -> Iterator[Any]:
    made = begun(2)
    yield made
    made.shutdown()


def test_a_cluster_gives_the_bits_of_one_process(two: Any, tiny_model: Make, tmp_path: Path) -> None:
    """Every kind of job, in one go; experts with few tokens are among them."""
    model, calibration = tiny_model("gpt_oss"), killing.text(tmp_path)
    with cluster(two.address, model) as across:
        for job, flags in killing.JOBS.items():
            for name, map_ in (("here", here), ("there", across)):
                out = tmp_path / f"{job} {name}"
                quantize(model, out, **flags, calibration=calibration, evaluated=False, across=map_)
            assert killing.contents(tmp_path / f"{job} here") == killing.contents(tmp_path / f"{job} there")
        asked = {"metrics": ("fisher_error", "output_error"), "calibration": calibration, "options": [Precision(3, 32)]}
        assert measure(model, **asked).metrics == measure(model, **asked, across=across).metrics


def test_the_command_line_and_errors_of_nodes(
    two: Any, tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("olmoe", num_hidden_layers=3)
    words = ["quantize", str(folder), "--uniform", "3", "--group-size", "32", "--method", "rtn", "--no-eval", "--json"]
    assert main([*words, "-o", str(tmp_path / "here")]) == 0
    capsys.readouterr()
    assert main([*words, "-o", str(tmp_path / "there"), "--ray", two.address]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["expert"] for event in told if "expert" in event] == [8] * 3
    assert killing.contents(tmp_path / "here") == killing.contents(tmp_path / "there")

    name = next(key for key in tensors(folder) if "experts.3.up_proj" in key)
    rewrite(folder, {name: torch.full_like(tensors(folder)[name], torch.nan)})
    with cluster(two.address, folder) as across, pytest.raises(ModelError, match="NaN"):
        quantize(folder, tmp_path / "bad", uniform=Precision(3, 32), method="rtn", evaluated=False, across=across)
    assert not (tmp_path / "bad").exists()
    with (
        pytest.raises(InputError, match="takes the whole model in one process"),
        cluster(two.address, folder) as across,
    ):
        measure(folder, ["hessian_trace"], across=across)
    with pytest.raises(InputError, match=r"has no .*nowhere; put the checkpoint"):
        cluster(two.address, tmp_path / "nowhere").__enter__()


def slowly(shared: Any, item: Any, device: torch.device, *, work: Any, notes: Path) -> Any:
    """Work that leaves a note of its process's node, when it begins and when it ends."""
    note = notes / str(uuid4())
    note.with_suffix(".begun").write_text(f"{os.getppid()} {item}")
    time.sleep(0.5)
    made = work(shared, item, device)
    note.with_suffix(".done").touch()
    return made


class Slowly:
    """A map that calls ``disturb`` once, when its first result has come."""

    def __init__(self, across: Map, notes: Path, disturb: Callable[[], None]) -> None:
        self.across, self.notes, self.disturb, self.calm = across, notes, disturb, True

    def __call__(self, work: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        for made in self.across(partial(slowly, work=work, notes=self.notes), shared, items):
            if self.calm:
                self.calm = False
                self.disturb()
            yield made


def test_a_node_that_is_killed(two: Any, tiny_model: Make, tmp_path: Path) -> None:
    """Its units are done again by the other one, and nobody sees a difference."""
    model, calibration, notes = tiny_model("olmoe"), killing.text(tmp_path), tmp_path / "notes"
    notes.mkdir()
    flags: dict[str, Any] = {**killing.JOBS["output error"], "calibration": calibration, "evaluated": False}
    quantize(model, tmp_path / "calm", **flags, max_memory=None)
    lost: list[tuple[int, str]] = []

    def kill() -> None:
        """SIGKILL to the node process (its workers' parent) that has a unit in work."""
        while not lost:
            running = [n for n in notes.glob("*.begun") if not n.with_suffix(".done").exists()]
            lost.extend((int(node), item) for node, _, item in (n.read_text().partition(" ") for n in running[:1]))
        os.kill(lost[0][0], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch, cluster(two.address, model) as across:
        patch.setattr("mopeq.quantize.slab_bytes", lambda limit, need: 1)  # one expert a unit
        quantize(model, tmp_path / "killed", **flags, across=Slowly(across, notes, kill))
        assert isinstance(across, Cluster)
        assert across.slots() == 1
    assert killing.contents(tmp_path / "calm") == killing.contents(tmp_path / "killed")
    node, item = lost[0]
    said = [note.read_text().partition(" ")[::2] for note in notes.glob("*.begun")]
    again = [other for other, same in said if same == item]
    assert str(node) in again
    assert Counter(again)[str(node)] < len(again)


def test_no_node_left(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, notes = tiny_model("olmoe"), tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(integration, "PATIENCE", 2.0)
    made = begun(1)
    try:
        with cluster(made.address, model) as across:
            kill = partial(made.remove_node, made.worker_nodes.copy().pop(), allow_graceful=False)
            with pytest.raises(InputError, match=r"no node left with 1 processors.*--resume"):
                list(Slowly(across, notes, kill)(_same, None, range(8)))
        with pytest.raises(InputError, match="no node of the Ray cluster has 1 processors"):
            cluster(made.address, model).__enter__()
    finally:
        made.shutdown()


def test_no_cluster(tiny_model: Make) -> None:
    with pytest.raises(InputError, match=r"no Ray cluster at '127.0.0.1:1' \(.*\); start one with ray start --head"):
        cluster("127.0.0.1:1", tiny_model("olmoe")).__enter__()


def _same(shared: None, item: int, device: torch.device) -> int:
    return item
