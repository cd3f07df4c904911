"""Settings of the documentation. Each build draws the figures anew, with the library as it is."""

import doctest
import runpy
from pathlib import Path

import ppo

HERE = Path(__file__).parent

project = "ppo"
author = "The ppo authors"
project_copyright = "2026, The ppo authors"
version = release = ppo.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
]
default_role = "code"
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"ppo {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def draw_figures(app):
    """Run every script of ``figures/``: each draws the figure of its own name."""
    folder = HERE / "_static" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted((HERE / "figures").glob("*.py")):
        runpy.run_path(str(script))["draw"](folder / f"{script.stem}.svg")


def setup(app):
    """Hook the figures into the build, before any page is read."""
    app.connect("builder-inited", draw_figures)
