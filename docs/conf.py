"""Sphinx configuration: API reference from docstrings, tutorials run by sphinx-gallery."""

import os
from pathlib import Path

import pyro_vem

ROOT = Path(__file__).parent.parent
os.environ.setdefault("PYRO_VEM_OUT", str(ROOT / "docs" / "_build" / "demo"))

project = "pyro_vem"
author = "The pyro_vem authors"
copyright = "2026, the pyro_vem authors"
version = release = pyro_vem.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_vem {version}"

default_role = "py:obj"
rst_prolog = ".. currentmodule:: pyro_vem\n"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "tutorials"),
    "gallery_dirs": "gallery",
    "filename_pattern": "plot_",
    "ignore_pattern": r"(groups|parquet)\.py",  # how-to scripts, shown in scale.rst
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
}

# Inventories of other projects cannot be reached everywhere: names from outside are known by pattern.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|pyro|numpy|np|pandas|pd|arviz|collections|typing|pathlib|enum|jaxtyping)(\..*)?"),
    ("py:.*", r"(Any|Tensor|Callable|Mapping|Sequence|Path|Literal|Float|nn\.Module|Transform|NDArray)"),
    ("py:.*", r"pyro_vem\.model\.roles\.Fn"),
    (
        "py:.*",
        r"(Normal|SVI|Predictive|optional|ELBO|Vector|Schedule|StepMethod|Callback|Program|State|Setup)",
    ),
]
