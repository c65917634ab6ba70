"""The flags of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version

from mopeq.cli import commands
from mopeq.cli.align import add_align, add_align_to_quantize, do_align
from mopeq.cli.evaluate import add_eval, do_eval
from mopeq.cli.export import add_export, do_export
from mopeq.cli.fit import add_fit, add_fit_to_allocate
from mopeq.cli.moqe import add_moqe
from mopeq.cli.panels import add_panels, do_panels
from mopeq.cli.recipes import add_recipe
from mopeq.cli.serve import add_serve, do_serve
from mopeq.cli.spread import add_spread
from mopeq.cli.talk import do_chat, do_run
from mopeq.precision import DEFAULT_BITS

__all__ = ["parser"]

FITS = "(default: the largest of 128, 64, 32 that fits the model)"


def parser() -> argparse.ArgumentParser:
    """All sub-commands and their flags."""
    top = argparse.ArgumentParser(
        prog="mopeq",
        description="Give every expert of a mixture-of-experts model its own bit-width, and run the result.",
    )
    top.add_argument("--version", action="version", version=f"mopeq {version('mopeq')}")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], text: str, *, json: bool = True, events: bool = False
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        if json:
            what = "progress and result, a JSON object a line," if events else "one JSON object"
            made.add_argument("--json", action="store_true", help=f"print {what} instead of a table")
        made.set_defaults(run=run, default_of=made.get_default)
        return made

    p = verb("quickstart", commands.do_quickstart, "run the main job on the bundled model")
    p.add_argument("-o", "--out", default="mopeq-quickstart", help="folder for results (default: %(default)s)")
    p.add_argument("--vlm", action="store_true", help="on the vision-language model, judged by questions about images")

    p = verb("describe", commands.do_describe, "show what mopeq understands of a model")
    _model(p)

    p = verb("analyze", commands.do_analyze, "measure every expert", events=True)
    _model(p)
    _calibration(p)
    p.add_argument(
        "--metrics",
        default="frequency,gate_mass,fisher_error,output_peak",
        help="names, comma-separated (default: %(default)s)",
    )
    _options(p)
    _bounded(p)
    p.add_argument("-o", "--out", default="stats.json", help="file to write (default: %(default)s)")

    p = verb("allocate", commands.do_allocate, "give every expert a precision")
    p.add_argument("stats", help="stats.json from mopeq analyze")
    p.add_argument("--method", default="knapsack", choices=("knapsack", "kmeans", "uniform", "random"))
    how = p.add_mutually_exclusive_group()
    how.add_argument("--budget", help="3.0bpw (bits per routed-expert weight) or 1.4GB (the whole checkpoint)")
    add_fit_to_allocate(p, how)
    p.add_argument("--cost", help="cost metric of the knapsack (default: fisher_error, else output_error)")
    p.add_argument("--score", default="hessian_trace", help="metric, or product such as frequency*fisher, of kmeans")
    p.add_argument("--scope", default="model", choices=("layer", "model"), help="k-means per layer or over the model")
    p.add_argument("--levels", help="bits or precisions, comma-separated (default: those measured, or 2,3,4)")
    p.add_argument(
        "--granularity", default="group", choices=("group", "expert"), help="down may differ from gate and up, or not"
    )
    _uniform_layers(p)
    _protect(p)
    p.add_argument("--group-size", type=int, help=f"inputs per scale of --levels {FITS}")
    p.add_argument("--symmetric", action="store_true", help="no zero points in --levels")
    _rest(p)
    _seed(p)
    p.add_argument("-o", "--out", default="precision.json", help="file to write (default: %(default)s)")

    p = verb("quantize", commands.do_quantize, "quantize and pack a model, with a map or to a budget", events=True)
    _model(p)
    p.add_argument("-o", "--out", required=True, help="folder to make")
    how = p.add_mutually_exclusive_group(required=True)
    how.add_argument("--budget", help="3.0bpw (bits per routed-expert weight) or 1.4GB (the whole checkpoint)")
    add_fit(p, how)
    how.add_argument("--map", help="precision.json from mopeq allocate")
    how.add_argument("--uniform", help="one precision for every expert, such as 3 or 4g128s")
    add_recipe(p)
    _calibration(p)
    _options(p)
    p.add_argument("--cost", default="fisher_error", help="cost metric of the allocation (default: %(default)s)")
    p.add_argument("--granularity", default="group", choices=("group", "expert"))
    _uniform_layers(p)
    _protect(p)
    _rest(p)
    p.add_argument("--no-eval", action="store_true", help="do not compare the result with the original")
    p.add_argument(
        "--guard",
        action=argparse.BooleanOptionalAction,
        help="pack a uniform map where the allocated one is not better on text kept apart (default, unless --no-eval)",
    )
    p.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="N",
        help="try N exchanges of precisions on text kept apart (default: 0)",
    )
    p.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="quantize layers on what the packed ones before them give, making up for their errors (gptq)",
    )
    add_align_to_quantize(p)
    _bounded(p)

    add_panels(
        verb("panels", do_panels, "lay out a packed model for this processor, so that run and chat start at once")
    )

    p = verb("align", do_align, "fit the routers of a packed model to the original's")
    add_align(p)
    _calibration(p)

    add_export(verb("export", do_export, "write a packed model for other runtimes"))

    p = verb("run", do_run, "generate text from a prompt")
    _model(p)
    p.add_argument("--prompt", required=True)
    _images(p)
    _sampling(p)

    p = verb("chat", do_chat, "talk to a model in the terminal", json=False)
    _model(p)
    _images(p)
    _sampling(p)

    add_serve(verb("serve", do_serve, "serve a model over HTTP, as OpenAI does", json=False))

    p = verb("eval", do_eval, "perplexity, divergence from the original, tasks, questions about images, speed")
    _model(p)
    add_eval(p)
    _seed(p)

    p = verb("report", commands.do_report, "make one HTML page from the files in DIR/mopeq")
    p.add_argument("folder", metavar="DIR")
    p.add_argument("-o", "--out", help="page to write (default: DIR/mopeq/report.html)")

    add_moqe(verbs)
    return top


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a local folder or a hub id")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="compute type (default: the checkpoint's)"
    )


def _calibration(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data",
        help="calibrate on .txt, .jsonl, .parquet, a folder of them, hf:OWNER/NAME, a mix such as a.jsonl:2,b.txt, "
        "or self, which the model writes itself (default: the bundled text)",
    )
    p.add_argument("--samples", type=int, default=64, help="sequences (default: %(default)s)")
    p.add_argument("--length", type=int, default=512, help="tokens of a sequence (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument(
        "--modality-weight", type=float, default=1.0, metavar="W",
        help="what a text token counts in moments and costs, an image token being 1 (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--balance", type=float, default=0.0, metavar="R",
        help="choose sequences so that each expert gets R times an even share of tokens where it can (default: 0, no)",
    )  # fmt: skip
    p.add_argument(
        "--cost-share", type=float, default=0.25, metavar="S",
        help="share of the calibration text that costs are measured on; 1: all (default: %(default)s)",
    )  # fmt: skip
    _seed(p)


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--method", "--quantizer", default="gptq", help="gptq, signround, rtn, rtn-mse or hqq (default: %(default)s)"
    )
    usual = ",".join(map(str, DEFAULT_BITS))
    p.add_argument("--levels", default=usual, help="bits or precisions to choose from (default: %(default)s)")
    p.add_argument("--group-size", type=int, help=f"inputs per scale {FITS}")
    p.add_argument("--symmetric", action="store_true", help="no zero points")
    p.add_argument("--hadamard", action="store_true", help="experts' inputs rotated: smaller errors, slower products")


def _bounded(p: argparse.ArgumentParser) -> None:
    add_spread(p)
    p.add_argument("--resume", action="store_true", help="go on with what the same command left unfinished")
    p.add_argument("--max-memory", metavar="SIZE", help="such as 8GB: keep below it, or say what is needed")


def _uniform_layers(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--uniform-layers", action="store_true", help="one precision for all experts of a layer, for mopeq export"
    )


def _protect(p: argparse.ArgumentParser) -> None:
    p.add_argument("--no-protect", action="store_true", help="do not give super-experts the most bits on offer")


def _rest(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--rest",
        default="",
        metavar="GROUP=PRECISION,...",
        help="precision outside the experts, such as attention=4g64,lm_head=16 (default: 8g128s); auto: choose it, in "
        "the same bytes (quantize with a budget)",
    )


def _seed(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=_seed_number, default=0, help="of everything random, 0 to 2**32 - 1 (default: 0)")


def _seed_number(text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**32:  # what torch, numpy and lm-eval all take
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 0 to {2**32 - 1}")
    return number


def _images(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="an image before the first words; may be repeated"
    )


def _sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0, help="0 samples from all tokens (default)")
    _seed(p)
    p.add_argument("--device", help="cpu, cuda, cuda:1 ...")
