"""``mopeq serve``."""

from __future__ import annotations

import argparse
import os
import shlex

__all__ = ["add_serve", "do_serve"]


def add_serve(p: argparse.ArgumentParser) -> None:
    """Its flags."""
    p.add_argument("model", metavar="MODEL", help="a local folder or a hub id")
    p.add_argument("--engine", default="auto", choices=("auto", "vllm", "native"), help="auto: vLLM if installed")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--name", help="of the model, for clients (default: the folder's)")
    p.add_argument("--api-key", help="that clients must send (default: MOPEQ_API_KEY, or none)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the checkpoint's)")
    p.add_argument("--max-body", type=int, help="bytes of a request (native; default: 1 MiB, with images 20 MiB)")
    p.add_argument("--max-seconds", type=float, default=600.0, help="for an answer (native; default: %(default)s)")
    p.add_argument("--max-waiting", type=int, default=16, help="requests in line (native; default: %(default)s)")
    p.add_argument(
        "--max-pixels", type=int, default=32_000_000, help="of a request's images (native; default: %(default)s)"
    )
    p.add_argument("--image-hosts", default="", metavar="HOST,...", help="take images from these by http(s) (native)")
    p.add_argument("--vllm", default="", metavar="FLAGS", help="for vLLM, as in --vllm='--max-model-len 4096'")


def do_serve(options: argparse.Namespace) -> None:
    """Serve a model over HTTP."""
    from mopeq.serve import Limits, serve

    serve(
        options.model,
        engine=options.engine,
        host=options.host,
        port=options.port,
        name=options.name,
        api_key=options.api_key or os.environ.get("MOPEQ_API_KEY", ""),
        dtype=options.dtype,
        limits=Limits(
            body_bytes=options.max_body,
            answer_seconds=options.max_seconds,
            waiting=options.max_waiting,
            pixels=options.max_pixels,
            image_hosts=frozenset(filter(None, options.image_hosts.split(","))),
        ),
        vllm_arguments=shlex.split(options.vllm),
    )
