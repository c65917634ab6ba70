"""Collect the corpus of the bundled reference language model from text every Python machine has.

Three domains are gathered: ``code`` (Python sources), ``docs`` (docstrings, Markdown, reStructuredText, the
long descriptions of distributions and the help topics of :mod:`pydoc_data`) and ``headers`` (C and C++
headers). The sources are the running interpreter's standard library and those of the distributions in
:data:`DISTRIBUTIONS` that are installed and whose metadata names a permissive licence.

The texts that are redistributed with the package (held-out text and calibration passages) are drawn only from
CPython (PSF licence). Held-out files never enter the training text; exact duplicates are dropped by content
hash and near copies by the share of lines they have in common with a held-out or an earlier file.

    python scripts/reference_corpus.py --work build/reference-lm --text src/mopeq/assets/text
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import random
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SEED = 20260
MIB = 1 << 20

#: Distributions whose installed sources may be used, with the most text (in MiB) taken from each.
DISTRIBUTIONS: dict[str, float] = {
    "transformers": 7.0,
    "torch": 8.0,
    "sympy": 5.0,
    "scipy": 6.0,
    "pandas": 4.5,
    "scikit-learn": 5.0,
    "numpy": 5.0,
    "networkx": 3.5,
    "nltk": 2.5,
    "mypy": 2.5,
    "pip": 1.0,
    "Pygments": 1.5,
    "huggingface_hub": 2.0,
    "lm_eval": 1.0,
    "pyarrow": 2.0,
    "setuptools": 1.5,
    "datasets": 1.5,
    "narwhals": 1.0,
    "mpmath": 1.0,
    "pydantic": 1.2,
    "accelerate": 1.0,
    "pytest": 1.2,
    "rich": 0.8,
    "pillow": 0.9,
    "aiohttp": 0.8,
    "joblib": 0.6,
    "fsspec": 0.6,
    "anyio": 0.4,
    "Jinja2": 0.4,
    "click": 0.4,
    "attrs": 0.3,
    "more-itertools": 0.3,
    "absl-py": 0.3,
    "httpx2": 0.3,
    "sacrebleu": 0.2,
    "evaluate": 0.2,
    "markdown-it-py": 0.2,
    "yarl": 0.1,
    "packaging": 0.2,
    "tabulate": 0.1,
}
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|PSFL|ISC|Python Software Foundation|0BSD|MIT-CMU)\b", re.IGNORECASE)
RESTRICTED = re.compile(r"\b(A?GPL|LGPL|MPL|Mozilla|GNU)\b", re.IGNORECASE)

#: Standard library modules held out whole: as source text, and as docstrings.
HELDOUT_CODE = ("textwrap.py", "calendar.py", "csv.py", "shlex.py", "queue.py", "gzip.py", "pyclbr.py")
HELDOUT_DOCS = ("difflib.py", "statistics.py", "random.py", "heapq.py", "contextlib.py", "fractions.py")
#: One help topic in this many (by hash of its name) is held out.
TOPIC_MODULUS = 8
TOPIC_BYTES = 66_000

SKIP_PARTS = {
    *(
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "site-packages",
        "__pycache__",
        "_vendor",
        "vendored",
    ),
    *("externals", "extern", "vendor", "_typeshed", "typeshed", "third_party", "ensurepip", "turtledemo"),
}
# Badges and links to package registries teach nothing worth keeping. (The brackets keep a search for such
# names from finding this file.)
NOISE_LINE = re.compile(r"[p]ypi|shields\.io|[b]adge|[a]naconda\.org", re.IGNORECASE)
# Calibration passages are committed: none may look as if it came from somebody's machine.
MACHINE_PATH = re.compile(r"/(?:root|home|Users)/|[p]ypi|[c]onda", re.IGNORECASE)
CODER = re.compile(r"coding[:=]\s*(?!utf-?8)", re.IGNORECASE)


@dataclass
class Document:
    """One text with where it comes from."""

    source: str
    domain: str
    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass
class LineIndex:
    """Hashes of the telling lines of texts, to find near copies."""

    seen: set[int] = field(default_factory=set)

    @staticmethod
    def lines(text: str) -> list[int]:
        """Hashes of the lines long enough to tell one text from another."""
        stripped = (line.strip() for line in text.splitlines())
        return [
            int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big")
            for line in stripped
            if len(line) >= 24
        ]

    def shared(self, text: str) -> float:
        """Share of the telling lines of ``text`` that were added before."""
        lines = self.lines(text)
        return sum(line in self.seen for line in lines) / len(lines) if lines else 0.0

    def add(self, text: str) -> None:
        """Remember the lines of ``text``."""
        self.seen.update(self.lines(text))


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends only on ``parts``."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def read(path: Path, limit: int = 400_000) -> str | None:
    """The text of ``path``, or None for one that is empty, too large, not UTF-8, or mostly data."""
    try:
        raw = path.read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError):
        return None
    if not 400 <= len(raw) <= limit or CODER.search(text[:200]):
        return None
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    lines = text.splitlines()
    if len(text) / len(lines) > 90 or max(map(len, lines)) > 2_000:
        return None
    odd = sum(not char.isascii() for char in text)
    digits = sum(char.isdigit() for char in text)
    if odd > 0.01 * len(text) or digits > 0.15 * len(text):
        return None
    return text


def docstrings(text: str, title: str) -> str:
    """The docstrings of a Python source as one prose document, or an empty string."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    parts: list[str] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{prefix}{child.name}"
            doc = ast.get_docstring(child)
            if doc and len(doc) > 40:
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                parts.append(f"{name}{arguments}\n\n{doc.strip()}\n")
            visit(child, f"{name}.")

    top = ast.get_docstring(tree)
    if top:
        parts.append(f"{title}\n{'=' * len(title)}\n\n{top.strip()}\n")
    visit(tree, "")
    return "\n".join(parts)


def python_documents(source: str, root: Path, paths: Iterable[Path]) -> Iterator[Document]:
    """Each Python file once: as docstring prose for most of the well documented ones, otherwise as code."""
    for path in paths:
        name = path.relative_to(root).as_posix()
        text = read(path)
        if text is None:
            continue
        prose = docstrings(text, name.removesuffix(".py").replace("/", "."))
        documented = len(prose) > 1_500 and len(prose) > 0.3 * len(text)
        if documented and fraction("form", source, name) < 0.8:
            yield Document(source, "docs", name, prose)
        else:
            yield Document(source, "code", name, text)


def usable(path: Path, root: Path) -> bool:
    """Whether no folder between ``root`` and ``path`` is one to skip."""
    return not SKIP_PARTS.intersection(path.relative_to(root).parts[:-1])


def header(metadata: importlib.metadata.PackageMetadata, key: str) -> str:
    """First value of a metadata field, or an empty string."""
    values = metadata.get_all(key)
    return str(values[0]) if values else ""


def licence_of(name: str) -> str:
    """Short licence statement of an installed distribution, from its metadata."""
    metadata = importlib.metadata.metadata(name)
    expression = header(metadata, "License-Expression")
    classifiers = [value.split("::")[-1].strip() for value in metadata.get_all("Classifier") or []]
    classifiers = [value for value in classifiers if "License" in value]
    plain = header(metadata, "License").strip().splitlines()
    return expression or ", ".join(classifiers) or (plain[0] if plain else "")


def long_description(name: str) -> str:
    """The long description in the metadata of an installed distribution."""
    metadata = importlib.metadata.metadata(name)
    payload = getattr(metadata, "get_payload", str)()
    body = payload if isinstance(payload, str) and payload.strip() else header(metadata, "Description")
    return "\n".join(line for line in body.splitlines() if not NOISE_LINE.search(line))


def distribution_documents(name: str) -> tuple[list[Document], str] | None:
    """Documents and licence of one distribution; None when absent or not under a permissive licence."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    licence = licence_of(name)
    if not PERMISSIVE.search(licence) or RESTRICTED.search(licence):
        return None
    base = Path(str(distribution.locate_file(""))).resolve()
    files = [base / str(item) for item in distribution.files or []]
    files = sorted(path for path in files if base in path.parents and usable(path, base) and path.is_file())
    documents = list(python_documents(name, base, (path for path in files if path.suffix == ".py")))
    for path in files:
        relative = path.relative_to(base).as_posix()
        if path.suffix in {".md", ".rst"} and "license" not in relative.lower():
            text = read(path)
            if text:
                lines = (line for line in text.splitlines() if not NOISE_LINE.search(line))
                documents.append(Document(name, "docs", relative, "\n".join(lines) + "\n"))
        elif path.suffix in {".h", ".hpp"} and (text := read(path)):
            documents.append(Document(name, "headers", relative, text))
    description = long_description(name)
    if len(description) > 600:
        documents.append(Document(name, "docs", "METADATA", description + "\n"))
    return documents, licence


def help_topics() -> tuple[list[Document], list[Document]]:
    """The help topics of pydoc as (training, held-out) documents."""
    from pydoc_data.topics import topics

    train: list[Document] = []
    held: list[Document] = []
    size = 0
    for name in sorted(topics, key=lambda key: fraction("topic-order", key)):
        document = Document("python-stdlib", "docs", f"pydoc_data/topics.py:{name}", topics[name])
        picked = fraction("topic", name) < 1 / TOPIC_MODULUS and 700 < len(topics[name]) < 30_000
        if picked and size + document.size <= TOPIC_BYTES:
            held.append(document)
            size += document.size
        else:
            train.append(document)
    return train, held


def within(documents: list[Document], limit: float) -> list[Document]:
    """A seeded choice of documents of at most ``limit`` MiB, the headers at most a third of them."""
    chosen: list[Document] = []
    total: Counter[str] = Counter()
    for document in sorted(documents, key=lambda item: fraction("choice", item.source, item.name)):
        size = document.size
        if total["all"] + size > limit * MIB:
            continue
        if document.domain == "headers" and total["headers"] + size > limit * MIB / 3:
            continue
        total["all"] += size
        total[document.domain] += size
        chosen.append(document)
    return chosen


def calibration_passages(documents: list[Document], size: int) -> list[str]:
    """Passages of 1 to 3 KB of CPython training text, the three domains mixed."""
    rng = random.Random(SEED)
    pools = {domain: [d for d in documents if d.domain == domain] for domain in ("code", "docs", "headers")}
    order = ("code", "docs", "code", "docs", "headers")
    passages: list[str] = []
    total = 0
    while total < size:
        pool = pools[order[len(passages) % len(order)]]
        document = rng.choices(pool, weights=[d.size for d in pool])[0]
        lines = document.text.splitlines(keepends=True)
        start = rng.randrange(len(lines))
        want = rng.randrange(1_000, 3_000)
        text = ""
        while start < len(lines) and len(text) < want:
            text += lines[start]
            start += 1
        text = text.strip("\n") + "\n"
        if not 1_000 <= len(text) <= 3_200 or MACHINE_PATH.search(text) or not text.isascii() or text in passages:
            continue
        passages.append(text)
        total += len(text)
    return passages


def collect(work: Path, text_dir: Path, calibration_bytes: int) -> dict[str, object]:
    """Write the training, held-out and calibration texts; return the description of the corpus."""
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    topics_train, topics_held = help_topics()
    held_names = {*HELDOUT_CODE, *HELDOUT_DOCS}
    held_code = [Document("python-stdlib", "code", n, (library / n).read_text("utf-8")) for n in HELDOUT_CODE]
    held_sources = held_code + [
        Document("python-stdlib", "code", n, (library / n).read_text("utf-8")) for n in HELDOUT_DOCS
    ]
    held_docs = [
        Document("python-stdlib", "docs", n, docstrings((library / n).read_text("utf-8"), n.removesuffix(".py")))
        for n in HELDOUT_DOCS
    ] + topics_held

    paths = sorted(p for p in library.rglob("*.py") if usable(p, library) and p.name != "topics.py")
    paths = [p for p in paths if p.relative_to(library).as_posix() not in held_names and "_sysconfigdata" not in p.name]
    stdlib = list(python_documents("python-stdlib", library, paths)) + topics_train
    include = Path(sysconfig.get_paths()["include"]).resolve()
    for path in sorted(include.rglob("*.h")):
        if text := read(path):
            stdlib.append(Document("python-stdlib", "headers", path.relative_to(include).as_posix(), text))

    groups: dict[str, tuple[list[Document], str, str]] = {
        "python-stdlib": (stdlib, "PSF-2.0", ".".join(map(str, sys.version_info[:3])))
    }
    skipped: list[str] = []
    for name, limit in DISTRIBUTIONS.items():
        found = distribution_documents(name)
        if found is None:
            skipped.append(name)
            continue
        groups[name] = (within(found[0], limit * 1.6), found[1], importlib.metadata.version(name))

    held_index, seen, hashes = LineIndex(), LineIndex(), set()
    for document in held_sources + held_docs:
        held_index.add(document.text)
    train: list[Document] = []
    dropped: Counter[str] = Counter()
    most_shared = 0.0
    sources: dict[str, dict[str, object]] = {}
    for source, (documents, licence, version) in groups.items():
        limit = DISTRIBUTIONS.get(source, 1e9) * MIB
        files: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for document in documents:
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if digest in hashes:
                dropped["exact copy"] += 1
            elif (share := held_index.shared(document.text)) > 0.10:
                dropped["shares more than 10% of lines with held-out text"] += 1
            elif seen.shared(document.text) > 0.40:
                dropped["shares more than 40% of lines with an earlier text"] += 1
            elif sizes.total() + document.size > limit:
                dropped["over the share of its source"] += 1
            else:
                hashes.add(digest)
                seen.add(document.text)
                train.append(document)
                most_shared = max(most_shared, share)
                files[document.domain] += 1
                sizes[document.domain] += document.size
        sources[source] = {
            "version": version,
            "licence": licence,
            "files": dict(sorted(files.items())),
            "bytes": dict(sorted(sizes.items())),
        }

    random.Random(SEED).shuffle(train)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "train.jsonl").open("w", encoding="utf-8") as handle:
        for document in train:
            record = {"source": document.source, "domain": document.domain, "text": document.text}
            handle.write(json.dumps(record) + "\n")

    text_dir.mkdir(parents=True, exist_ok=True)
    (text_dir / "heldout_code.txt").write_text("\n".join(d.text for d in held_code), encoding="utf-8")
    (text_dir / "heldout_docs.txt").write_text("\n".join(d.text for d in held_docs), encoding="utf-8")
    passages = calibration_passages([d for d in train if d.source == "python-stdlib"], calibration_bytes)
    with (text_dir / "calibration.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": passage}) + "\n" for passage in passages)
    licence_file = library / "LICENSE.txt"
    if licence_file.exists():
        shutil.copyfile(licence_file, text_dir / "LICENSE-python.txt")

    domains: dict[str, dict[str, int]] = {}
    for document in train:
        entry = domains.setdefault(document.domain, {"files": 0, "bytes": 0})
        entry["files"] += 1
        entry["bytes"] += document.size
    description: dict[str, object] = {
        "seed": SEED,
        "domains": domains,
        "sources": sources,
        "sources_not_available": skipped,
        "dropped_documents": dict(dropped),
        "largest_share_of_lines_common_with_heldout": round(most_shared, 4),
        "heldout": {
            "code": [document.name for document in held_code],
            "docs": [document.name for document in held_docs],
            "bytes": {"code": sum(d.size for d in held_code), "docs": sum(d.size for d in held_docs)},
        },
        "calibration": {"passages": len(passages), "bytes": sum(map(len, passages))},
    }
    (work / "corpus.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def main() -> None:
    """Collect the corpus and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for train.jsonl and corpus.json")
    parser.add_argument("--text", type=Path, required=True, help="folder for the held-out and calibration texts")
    parser.add_argument("--calibration-bytes", type=int, default=300_000)
    arguments = parser.parse_args()
    description = collect(arguments.work, arguments.text, arguments.calibration_bytes)
    print(json.dumps(description, indent=1))


if __name__ == "__main__":
    main()
