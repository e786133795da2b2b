"""Fetch the tests that transformers' own source distribution holds: python tests/official/fetch.py.

They are transformers' work and not part of this project, so they are downloaded where they are needed and never
committed. Whatever version of transformers is installed, the tests are that version's.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from html.parser import HTMLParser
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urljoin, urlsplit

VERSION = version("transformers")
FOLDER = Path(__file__).parent / f".transformers-{VERSION}"
ARCHIVE = f"transformers-{VERSION}.tar.gz"


class FetchError(Exception):
    """The tests could not be fetched. The message says what was needed and what to do."""


class Links(HTMLParser):
    """The addresses on a page of a package index, which PEP 503 says is a list of links."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if (tag, name) == ("a", "href") and value]


def fetch(folder: Path = FOLDER) -> bool:
    """Make `folder` hold the archive's `tests`. Returns whether anything had to be fetched."""
    if folder.exists():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".transformers-fetching-"))
    try:
        archive = scratch / ARCHIVE
        archive.write_bytes(download(index_url()))
        unpack(archive, scratch / "unpacked")
        try:
            os.replace(scratch / "unpacked", folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def index_url() -> str:
    """The package index that pip is configured to use. (pip itself would build the archive only to name it.)"""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "https://pypi.org/simple"


def download(index: str) -> bytes:
    """The archive's bytes, which have the checksum that the index gives for them."""
    page = index.rstrip("/") + "/transformers/"
    links = Links()
    text, address = read(page)
    links.feed(text.decode())
    for link in links.found:
        url, _, fragment = urljoin(address, link).partition("#")
        if urlsplit(url).path.endswith(f"/{ARCHIVE}"):
            break
    else:
        raise FetchError(f"{host(page)} lists no {ARCHIVE}. Set PIP_INDEX_URL to an index that has source archives.")
    if not fragment.startswith("sha256="):
        raise FetchError(
            f"{host(page)} gives no sha256 for {ARCHIVE}, so what it sends cannot be checked. Set PIP_INDEX_URL."
        )
    data, _ = read(url)
    found, wanted = hashlib.sha256(data).hexdigest(), fragment.removeprefix("sha256=")
    if found != wanted:
        raise FetchError(f"{ARCHIVE} from {host(url)} has sha256 {found}, the index says {wanted}. Try again.")
    return data


def read(url: str) -> tuple[bytes, str]:
    """What is at `url`, and the address at which it was found in the end."""
    # An index may answer in JSON instead (PEP 691), unless it is told not to.
    request = urllib.request.Request(url, headers={"Accept": "text/html, */*;q=0.1"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read(), response.url
    except (OSError, HTTPException) as error:
        raise FetchError(
            f"{ARCHIVE}, which holds the official tests, was wanted from {host(url)}, but: {error}. Run this where "
            f"there is a network, set PIP_INDEX_URL to a package index that can be reached, or copy {FOLDER} from "
            "where this has worked."
        ) from error


def host(url: str) -> str:
    return urlsplit(url).hostname or url  # no more of it, for an index's address may hold a password


def unpack(archive: Path, folder: Path) -> None:
    """The archive's `tests` into `folder`, without links, devices or paths that lead out of it."""
    top = f"{ARCHIVE.removesuffix('.tar.gz')}/"
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if member.name.startswith(f"{top}tests/") and member.isfile()]
        for member in wanted:
            member.name = member.name.removeprefix(top)
        tar.extractall(folder, wanted, filter="data")
    # Left out of the archive, and read by a helper that imports transformers by path.
    (folder / "tests" / "__init__.py").touch()


if __name__ == "__main__":
    try:
        print("fetched:" if fetch() else "already there:", FOLDER)
    except FetchError as error:
        sys.exit(f"error: {error}")
