"""Sphinx builds the API reference from the docstrings.

sphinx-build -W .github/docs build/docs
"""

from __future__ import annotations

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
