"""One self-contained HTML page that explains a quantized model, made from JSON files alone.

The page needs no network and no library: styles and pictures are in it. See :mod:`mopeq.report.inputs` for the files.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mopeq.errors import OutputError
from mopeq.report.inputs import read_inputs
from mopeq.report.page import page

__all__ = ["render"]


def render(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a packed folder and return its path.

    Args:
        folder: a folder with ``mopeq/*.json`` in it; absent files leave their parts out.
        out: page to write; None is ``folder/mopeq/report.html``.

    Raises :class:`InputError` where there is nothing to report, :class:`MapError` for a malformed file,
    :class:`OutputError` where the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    out = folder / "mopeq" / "report.html" if out is None else Path(out)
    content = page(read_inputs(folder))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.jinja").render(content)
    beside = out.with_name(f".{out.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror}; expected the path of a file that can be written; choose another"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return out
