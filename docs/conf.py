"""Sphinx: the site is the repository's own pages, executed lessons and docstrings.

The source folder is the root of the repository, so that every link that works there works here:

    sphinx-build -W --keep-going -c docs -d build/doctrees . build/site

Nothing is executed and nothing is downloaded. Readers need no network either where the package
jupyter-server-mathjax is installed, whose MathJax is copied; else formulas are drawn by MathJax
from its usual address.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from diffad_lite import __version__
from diffad_lite.evaluation import claims, records, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data" / "results"

project = "diffad_lite"
author = "The diffad_lite authors"
copyright = "The diffad_lite authors. Code: MIT; text: CC BY 4.0; solar cells: CC BY-NC-SA 4.0"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx.ext.mathjax", "myst_nb"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
include_patterns += ["docs/**.md", "notebooks/**.ipynb"]
exclude_patterns = [".*", "build", "dist", "runs"]
templates_path = ["_templates"]

# Lessons are shown as they are committed. A slider's picture stands beside it; the slider itself
# needs a kernel, and the scripts that would draw it a network.
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # exercises begin at the third level

# Docstrings have the sections Args, Attributes, Returns, Raises.
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of dataclasses, which have no docstring of their own
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
maximum_signature_line_length = 90

html_theme = "sphinx_book_theme"
html_title = "diffad_lite"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}  # the root of the site leads to docs/index
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
}

# MathJax 2 with its fonts; left out are speech, translations, another output.
if MATHJAX := find_spec("jupyter_server_mathjax"):
    html_static_path.append(str(Path(MATHJAX.origin or "").parent / "static"))
    exclude_patterns += ["extensions/a11y/**", "localization/**", "jax/output/SVG/**"]
    myst_update_mathjax = False
    mathjax_path = "MathJax.js"
    mathjax2_config = {
        "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
        "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web", "imageFont": None, "scale": 92},
        "messageStyle": "none",
        "showMathMenu": False,
    }

# Folders have no page of their own.
FOLDERS = {"](notebooks/exercises)": "](docs/exercises.md)"}
FOLDERS["](notebooks/solutions)"] = "](docs/exercises.md)"


@cache
def rendered() -> dict[str, str]:
    """Every table of the course, and those of single methods: name -> Markdown.

    ``overview-METHOD`` is the overview with the controls beside one method, ``claims-METHOD`` the
    claims of its paper.
    """
    results = records.read_results(RESULTS)
    judged = claims.judge_all(results, RESULTS)
    found = tables.every_table(results, judged, RESULTS)
    for method, name in records.METHOD_NAMES.items():
        beside = ["brightness", "pca", "padim", "anoddpm", method]
        own = [one for one in judged if one.claim.method == name]
        chosen = [record for record in results if record["method"] in beside]
        found[f"overview-{method}"] = tables.overview_table(chosen)
        found[f"claims-{method}"] = claims.claims_table(own)
    return found


class ResultsTable(SphinxDirective):
    """``results-table``: a table rendered from the records in ``data/results``."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The table as nodes; an unknown name ends the build."""
        name = self.content[0].strip()
        if name not in rendered():
            raise self.error(f"no table {name!r}; there are: {', '.join(rendered())}")
        return self.parse_text_to_nodes(rendered()[name])


def plain_prose(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list) -> None:
    """Keep a docstring's ``config/*.yaml`` from opening an emphasis, its "T." from being a list."""
    lines[:] = [re.sub(r"/\*\.", r"/\\*.", line) for line in lines]
    lines[:] = [re.sub(r"(^|: )T\.(?= |$)", r"\1T\\.", line) for line in lines]


def redirect_folders(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to folders to the page that lists them."""
    for link, target in FOLDERS.items():
        source[0] = source[0].replace(link, target)


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.add_directive("results-table", ResultsTable)
    app.connect("source-read", redirect_folders)
    app.connect("autodoc-process-docstring", plain_prose)
