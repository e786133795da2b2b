"""The package's version, read by setup.cfg and by the command line."""

__version__ = "0.1.0"
