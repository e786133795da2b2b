"""The versions of packages that decide what is made, as receipts, caches and cards name them."""

from importlib.metadata import version

PACKAGES = ("transformers", "torch", "safetensors")


def versions(*others: str) -> dict[str, str]:
    """Of Finedeep, of the packages that decide what is made, and of others."""
    from finedeep import __version__  # of the code at work, which need not be installed

    return {"finedeep": __version__, **{package: version(package) for package in (*PACKAGES, *others)}}
