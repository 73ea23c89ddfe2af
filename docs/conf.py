"""Sphinx builds the site from the pages, executed lessons and docstrings of the repository.

The source folder is the root of the repository, so that the same links work in both:

    sphinx-build -W --keep-going -c docs -d build/doctrees . build/site

The build executes and downloads nothing. With the package jupyter-server-mathjax installed, the
site has a copy of MathJax, and readers need no network. Otherwise it loads MathJax from its usual
address.
"""

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from diffad_lite import __version__
from diffad_lite.evaluation import claims, records, tables

sys.path.insert(0, str(Path(__file__).parent))
from published import settings_table

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

# Lessons appear as committed. The image of a slider is shown, but not the slider itself: it needs a
# kernel, and its scripts need a network.
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # exercises begin with third-level headings

# Docstrings have the sections Args, Attributes, Returns, Raises.
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # for fields of dataclasses, which have no docstring
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

# MathJax 2 with its fonts, without speech, translations and SVG output.
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

# Folders have no page; their links lead to the list of exercises.
FOLDERS = {"](notebooks/exercises)": "](docs/exercises.md)"}
FOLDERS["](notebooks/solutions)"] = "](docs/exercises.md)"


@cache
def rendered() -> dict[str, str]:
    """Return name -> Markdown of every table of the course, and of two tables per method.

    ``overview-METHOD`` compares a method with the baselines; ``claims-METHOD`` lists the claims of
    its paper.
    """
    results = records.read_results(RESULTS)
    judged = claims.judge_all(results, RESULTS)
    rendered_tables = tables.every_table(results, judged, RESULTS)
    for method, name in records.method_names().items():
        compared = ["brightness", "pca", "padim", "anoddpm", method]
        records_compared = [record for record in results if record["method"] in compared]
        method_claims = [judgement for judgement in judged if judgement.claim.method == name]
        rendered_tables[f"overview-{method}"] = tables.overview_table(records_compared)
        rendered_tables[f"claims-{method}"] = claims.claims_table(method_claims)
    return rendered_tables


class ResultsTable(SphinxDirective):
    """``results-table``: a table rendered from the records in ``data/results``."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table as nodes; an unknown name ends the build."""
        name = self.content[0].strip()
        if name not in rendered():
            raise self.error(f"no table {name!r}; there are: {', '.join(rendered())}")
        return self.parse_text_to_nodes(rendered()[name])


class PaperProfile(SphinxDirective):
    """``paper-profile``: all fields of a method's paper profile, with what was published."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table as nodes; an unknown method ends the build."""
        made = self.parse_text_to_nodes(settings_table(self.content[0].strip()))
        for table in made:
            table["classes"].append("paper-profile")  # five columns: see site.css
        return made


def escape_markup(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list) -> None:
    """Escape ``config/*.yaml``, which would open an emphasis, and "T.", which would open a list."""
    lines[:] = [re.sub(r"/\*\.", r"/\\*.", line) for line in lines]
    lines[:] = [re.sub(r"(^|: )T\.(?= |$)", r"\1T\\.", line) for line in lines]


def redirect_folders(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace links to folders by links to the page that lists their files."""
    for link, target in FOLDERS.items():
        source[0] = source[0].replace(link, target)


def setup(app: Sphinx) -> None:
    """Register the directives and the two hooks."""
    app.add_directive("results-table", ResultsTable)
    app.add_directive("paper-profile", PaperProfile)
    app.connect("source-read", redirect_folders)
    app.connect("autodoc-process-docstring", escape_markup)
