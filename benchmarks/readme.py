"""A generated table's place in a document: between <!-- MARK:begin --> and <!-- MARK:end -->."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def put_into_readme(mark: str, table: str, readme: Path = README) -> None:
    """Replace what stands between the marks. Raises ValueError where they are not."""
    check_marks(mark, readme)
    begin, end = marks(mark)
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    text = readme.read_text(encoding="utf-8")
    readme.write_text(pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text), encoding="utf-8")


def check_marks(mark: str, readme: Path) -> None:
    """Raise ValueError where the document does not have the marks, in order."""
    begin, end = marks(mark)
    if end not in readme.read_text(encoding="utf-8").partition(begin)[2]:
        raise ValueError(f"{readme} has no {begin} ... {end} to put the table into.")


def marks(mark: str) -> tuple[str, str]:
    """The lines around a table."""
    return f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
