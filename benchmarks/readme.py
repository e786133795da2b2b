"""A generated table's place in a document: between <!-- MARK:begin --> and <!-- MARK:end -->."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def put_into_readme(mark: str, table: str, readme: Path = README) -> None:
    """Replace what stands between the marks. Raises ValueError where they are not."""
    text = readme.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark}:begin -->\n", f"\n<!-- {mark}:end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end.strip()), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme} has no {begin.strip()} ... {end.strip()} to put the table into.")
    readme.write_text(pattern.sub(lambda _: f"{begin}{table}{end}", text), encoding="utf-8")
