"""Work on a Ray cluster: :func:`cluster` gives a :class:`~mopeq.analyze.slab.Map` whose items run on its nodes.

The driver runs the model and writes the result; the nodes read the experts' weights from the checkpoint, which lies at
the same path everywhere, and send back codes and costs. A node that is lost costs the items it had: Ray runs them again
on another. Each item runs with as many threads as torch has here, so that the bits of the result are those of a run
without Ray on the same kind of processor. GPUs are used, one an item, where the nodes have them; theirs are other bits.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from mopeq.analyze.slab import Map
from mopeq.errors import InputError, MopeqError

__all__ = ["Cluster", "cluster"]

T = TypeVar("T")
Item = TypeVar("Item")
RETRIES = 5
"""Times that an item is run again after its node or process was lost."""
PATIENCE = 30.0
"""Seconds without a result after which it is asked whether there are nodes left."""
PACKAGES = ("mopeq", "torch", "transformers")


class Cluster:
    """The map. Two items are given out for each that can run at once, so that results wait in bounded memory."""

    def __init__(self, ray: Any, kind: str) -> None:
        self.ray, self.kind = ray, kind
        self.threads = torch.get_num_threads()
        need = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": self.threads}
        self._task = ray.remote(**need, max_retries=RETRIES, scheduling_strategy="SPREAD")(_run)

    def __call__(self, work: Callable[[Any, Item, torch.device], T], shared: Any, items: Sequence[Item]) -> Iterator[T]:
        """The results in order; errors of mopeq are raised here as they were there."""
        if not items:
            return
        sent = self.ray.put((work, shared))
        device = "cuda" if self.kind == "GPU" else "cpu"
        waiting: deque[Any] = deque()
        for item in items:
            if len(waiting) >= 2 * max(1, self.slots()):
                yield self._result(waiting.popleft())
            waiting.append(self._task.remote([sent], item, device, self.threads))  # in a list: Ray leaves it to _run
        while waiting:
            yield self._result(waiting.popleft())

    def slots(self) -> int:
        """Items that can run at once on the nodes that are there now."""
        return int(self.ray.cluster_resources().get(self.kind, 0)) // (1 if self.kind == "GPU" else self.threads)

    def _result(self, reference: Any) -> Any:
        failures = self.ray.exceptions
        while True:
            try:
                return self.ray.get(reference, timeout=PATIENCE)
            except failures.GetTimeoutError:
                if not self.slots():
                    raise InputError(
                        f"the Ray cluster has no node left with {self._need()}; "
                        "start some, and run the same command with --resume"
                    ) from None
            except failures.RayTaskError as error:
                if isinstance(error.cause, MopeqError):
                    raise error.cause from None
                raise
            except failures.RayError as error:
                raise InputError(
                    f"the Ray cluster gave a unit up ({type(error).__name__}), after {RETRIES} more tries where its "
                    "process was lost; look at the memory of the nodes, and run the same command with --resume"
                ) from error

    def _need(self) -> str:
        return "a GPU" if self.kind == "GPU" else f"{self.threads} processors"


_held: dict[str, Any] = {}
"""What the items of the last call share, in a process of a node: it would be unpacked anew for each of them."""


def _run(sent: list[Any], item: Any, device: str, threads: int) -> Any:
    """One item, in a process of a node."""
    import ray

    torch.set_num_threads(threads)
    name = sent[0].hex()
    if name not in _held:
        _held.clear()
        _held[name] = ray.get(sent[0])
    work, shared = _held[name]
    return work(shared, item, torch.device(device))


@contextmanager
def cluster(address: str, model: Path) -> Iterator[Map]:
    """The map over a running cluster; ``auto`` is the one that this machine belongs to.

    model: folder of the checkpoint that the nodes will read. Raises :class:`InputError` where there is no cluster,
    where a node has other versions than this process or lacks the folder, and where no node has processors to give.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray ({error}); install it with pip install 'mopeq[ray]', or leave it out"
        ) from error
    before = signal.getsignal(signal.SIGTERM)
    try:
        _answers(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"no Ray cluster at {address!r} ({reason}); start one with ray start --head, or give its address"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler leaves at once
    try:
        yield Cluster(ray, _checked(ray, model.resolve()))
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raise :class:`OSError` where nobody listens at HOST:PORT: Ray tries for minutes, and then ends the process."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _checked(ray: Any, model: Path) -> str:
    """Whether items run on ``GPU`` or ``CPU``; asks every node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    threads = torch.get_num_threads()
    if not any(node["Resources"]["CPU"] >= threads for node in nodes):
        raise InputError(
            f"no node of the Ray cluster has {threads} processors, the threads of this process; "
            f"start larger ones, or set OMP_NUM_THREADS to what one has"
        )
    asked = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_gpus=min(1, node["Resources"].get("GPU", 0)), scheduling_strategy=there)(_about)
        asked.append(task.remote(str(model)))
    try:
        found = ray.get(asked)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"a node of the Ray cluster cannot run mopeq ({reason}); install it on every node") from error
    own = _about(str(model))
    for about in found:
        for name in PACKAGES:
            if about[name] != own[name]:
                has = f"{name} {about[name]} and this process {own[name]}"
                raise InputError(f"node {about['host']} has {has}; install the same on all")
        if not about["model"]:
            raise InputError(f"node {about['host']} has no {model}; put the checkpoint where all nodes see it")
    return "GPU" if any(about["cuda"] for about in found) else "CPU"


def _about(model: str) -> dict[str, Any]:
    """What a process can tell of itself."""
    versions = {name: version(name) for name in PACKAGES}
    there = (Path(model) / "config.json").is_file()
    return {"host": socket.gethostname(), "model": there, "cuda": torch.cuda.is_available(), **versions}
