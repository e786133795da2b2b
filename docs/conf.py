"""Sphinx: `make docs` builds docs/_build/html; warnings are errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from configuration_finedeep import __version__

project = "Finedeep"
author = "The Finedeep authors"
copyright = "2026, the Finedeep authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["style"]
html_css_files = ["narrow.css"]
html_title = f"Finedeep {version}"
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autoclass_content = "class"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["myst.xref_missing"]  # links out of docs/, to files of the repository: tests/docs checks them

# `make docs` also runs the linkcheck builder on links within the documents; no other address is asked.
linkcheck_ignore = [r"https?://"]
