"""A generated table's place in a document: between <!-- MARK:begin --> and <!-- MARK:end -->."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/*.md", "benchmarks/RESULTS.md", "examples/RESULTS.md")


def put_table(mark: str, table: str, document: Path | None = None) -> None:
    """Replace what stands between the marks, by default in the document that has them.

    Raises:
        ValueError: no document has them, or more than one.
    """
    document = document or document_with(mark)
    check_marks(mark, document)
    begin, end = marks(mark)
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    text = document.read_text(encoding="utf-8")
    document.write_text(pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text), encoding="utf-8")


def table_in(mark: str) -> str:
    """What stands between the marks in the document that has them."""
    begin, end = marks(mark)
    text = document_with(mark).read_text(encoding="utf-8")
    return text.split(f"{begin}\n", 1)[1].split(f"\n{end}", 1)[0]


def document_with(mark: str) -> Path:
    """The one document with the marks. Raises ValueError where there is none, or more than one."""
    every = [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    found = [path for path in every if marks(mark)[0] in path.read_text(encoding="utf-8")]
    if len(found) != 1:
        places = ", ".join(path.relative_to(ROOT).as_posix() for path in found) or "none"
        raise ValueError(f"{marks(mark)[0]} has to be in one document; found in: {places}.")
    return found[0]


def check_marks(mark: str, document: Path) -> None:
    """Raise ValueError where the document does not have the marks, in order."""
    begin, end = marks(mark)
    if end not in document.read_text(encoding="utf-8").partition(begin)[2]:
        raise ValueError(f"{document} has no {begin} ... {end} to put the table into.")


def marks(mark: str) -> tuple[str, str]:
    """The lines around a table."""
    return f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
