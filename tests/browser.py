"""Pages as headless Chromium shows them, at a screen's width."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A tester's Chromium: no sandbox, since it may run as root, and no connection of its own.
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--virtual-time-budget=10000",
]
# A narrow window has a least width of its own; a frame has not.
FRAMES = """<!doctype html><body style="margin:0">
{frames}
<script>
function measure(page) {{
  const images = [...page.images]
  return {{
    scroll: page.documentElement.scrollWidth,
    images: images.length,
    drawn: images.filter(image => image.naturalWidth > 100).length,
    columns: Object.fromEntries([...page.querySelectorAll('th')].map(cell =>
      [cell.textContent, cell.getBoundingClientRect().right])),
    broken: [...page.querySelectorAll('h1, h2')].map(title => title.firstChild).filter(text => {{
      const words = page.createRange()
      words.selectNode(text)
      return !text.textContent.includes(' ') && words.getClientRects().length > 1
    }}).map(text => text.textContent),
  }}
}}
onload = () => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => measure(frame.contentDocument))
  document.body.textContent = JSON.stringify(found)
}}
</script>
"""


def look(pages: Iterable[Path], width: int, folder: Path) -> list[dict[str, Any]]:
    """Of each page: how wide it scrolls, its images and how many are drawn, where each column ends; in CSS pixels.

    Args:
        pages: HTML files.
        width: of the screen, in CSS pixels.
        folder: for the browser's files.
    """
    style = f"border:0;width:{width}px;height:4000px"
    frames = [f'<iframe src="{html.escape(page.resolve().as_uri())}" style="{style}"></iframe>' for page in pages]
    path = folder / f"frames-{width}.html"
    path.write_text(FRAMES.format(frames="\n".join(frames)))
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'browser'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(html.unescape(re.search(r"<body[^>]*>(.*)</body>", done.stdout, re.DOTALL)[1]))
