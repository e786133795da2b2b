"""A package, unlike the folder above, so that the two conftest.py do not answer to one name."""
