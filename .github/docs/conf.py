"""Sphinx builds the guides, and the API reference from the docstrings.

sphinx-build -W .github/docs build/docs
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

import refine_fast
from refine_fast import pipeline
from refine_fast.integrations import sentence_transformers

project = "refine_fast"
author = "The refine_fast authors"
copyright = author
release = version = refine_fast.__version__

# These packages load their names on first use, and autodoc documents only what is loaded.
for package in (pipeline, sentence_transformers):
    for name in package.__all__:
        setattr(package, name, getattr(package, name))

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
# A reference to a public name of refine_fast must resolve; other projects have no pages here.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!refine_fast\.).*"), (r"py:.*", r".*\._.*")]
# Results of different functions have fields of the same name.
suppress_warnings = ["ref.python"]
html_theme = "alabaster"
html_theme_options = {"description": "REFINE, with fused kernels", "fixed_sidebar": True}


def link_pages(app: Sphinx, tree: nodes.document) -> None:
    """The guides link to one another as .rst files, which is what GitHub shows."""
    for link in tree.findall(nodes.reference):
        page, dot_rst, anchor = link.get("refuri", "").partition(".rst")
        if dot_rst and "/" not in page:
            link["refuri"] = f"{page}.html{anchor}"


def setup(app: Sphinx) -> None:
    """Sphinx calls this when it has read the configuration."""
    app.connect("doctree-read", link_pages)
