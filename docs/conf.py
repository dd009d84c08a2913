"""How Sphinx builds these pages: `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import fastppo  # noqa: E402

project = "fastppo"
author = "the fastppo authors"
copyright = "the fastppo authors"
version = release = fastppo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "settings_reference"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "examples/**/README.md"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|Tensor|PreTrained|collections|typing|pathlib).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"fastppo {version}"
