"""The documents as a phone shows them."""

import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, look

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_documents_fit_a_narrow_screen(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", ROOT / "docs", tmp_path / "html"]
    subprocess.run(command, check=True, capture_output=True)
    pages = sorted(path for path in (tmp_path / "html").glob("*.html") if path.stem not in ("genindex", "search"))
    assert len(pages) >= 19
    for page, seen in zip(pages, look(pages, 360, tmp_path), strict=True):
        assert seen["scroll"] <= 360, page.name
        assert seen["images"] == seen["drawn"], page.name
        assert not seen["broken"], page.name
