"""Turns one executed notebook into one HTML page that loads nothing, and refuses a page that breaks that promise.

nbconvert does the conversion with the template in templates/fluxnb. Its stock templates load scripts from
the network and drop descriptions of images, so ours starts from nbconvert's structure only.
"""

from __future__ import annotations

import functools
import html
import os
import re
import sys
from pathlib import Path

from fluxnb.measure import telemetry
from fluxnb.report import import_jsonschema
from fluxnb.report.audit import MAX_PAGE_MB, check_page
from fluxnb.report.clean import clean
from fluxnb.report.html import inline, provenance_html
from fluxnb.report.pages import Page
from fluxnb.report.tables import dress

TEMPLATES = Path(__file__).parent / "templates"
WIDGET = "application/vnd.jupyter.widget-view+json"
# Only what can be shown without a script of ours; of several forms of one output, the first is taken.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
# A progress bar as tqdm draws it: "37%|███▋      | 37/100 [00:01<00:02, 30.1it/s]", "12it [00:03, 4.0it/s]".
PROGRESS_BAR = re.compile(r"\d+%\||\d+(it|B|k|M)? \[\d+:\d\d")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MODULES = "|".join(re.escape(name.replace("-", "_")) for name in telemetry.PACKAGES)
# where an environment happens to be, on this machine or on the one that the page was run on
PACKAGES = re.compile(rf"(?:/[^\s/:'\"]+)+/(?=(?:(?:site|dist)-packages|{_MODULES})/)")


def page_html(
    page: Page,
    run: dict,
    gpu: str,
    root: Path,
    around: tuple[Page | None, Page | None] = (None, None),
    max_page_mb: float = MAX_PAGE_MB,
) -> str:
    """The HTML of the notebook that a page is rendered from.

    Args:
        run: the content of run.json, for a page that doesn't know its own provenance.
        gpu: name of the configuration.
        root: the project's folder, which no page names.
        around: the pages before and after it, for the navigation.
        max_page_mb: how large it may be.

    Raises UserError for an image without a description, something loaded from elsewhere, or a page over the limit.
    """
    import_jsonschema()
    import nbformat

    content = nbformat.read(page.notebook, as_version=4)
    about = (page.state.get("provenance") or run) | {"measured": page.measured}
    facts = {
        "page": page,
        "gpu": gpu,
        "contents": prepare(content, root),
        "left_out": [inline(words) for words in page.state.get("left_out") or []],
        "provenance": provenance_html(about, page.rows or None),
        "style": style_sheet(),
        "previous": around[0],
        "next": around[1],
    }
    text, _ = _exporter().from_notebook_node(content, {"metadata": {"name": page.stem}, "fluxnb": facts})
    check_page(text, page.stem, max_page_mb)
    return text


def prepare(notebook, root: Path) -> list[dict]:
    """Make an executed notebook (nbformat node, changed in place) fit to be read; returns its contents list.

    Cells tagged `hide` and papermill's own error banners go. Markdown becomes HTML in cell.metadata.html, its
    first heading taken out for the page's header, the others given unique ids and listed as {"level", "id",
    "html"}. Outputs lose widgets, scripts, progress bars, terminal colours and the user's folders.
    """
    from nbconvert.filters import markdown2html

    hidden = {"hide", "papermill-error-cell-tag"}
    for kind in ("code", "markdown", "raw"):  # before any cell goes: numbers are those of the notebook
        for number, cell in enumerate((c for c in notebook.cells if c.cell_type == kind), 1):
            cell.metadata["number"] = number
    notebook.cells = [c for c in notebook.cells if not hidden & set(c.metadata.get("tags", []))]
    notebook.metadata.pop("widgets", None)
    contents: list[dict] = []
    used: set[str] = set()
    title_taken = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            markup = markdown2html(cell.source)
            if not title_taken and re.search(r"<h1\b", markup):
                markup = re.sub(r"<h1\b[^>]*>.*?</h1>", "", markup, count=1, flags=re.DOTALL)
                title_taken = True
            cell.metadata["html"] = _with_ids(markup, contents, used)
        elif cell.cell_type == "code":
            cell.outputs = list(_readable_outputs(cell.outputs, root))
    return contents


def style_sheet() -> str:
    """The CSS of all pages."""
    return (TEMPLATES / "fluxnb" / "style.css").read_text(encoding="utf-8")


def render_template(template: str, here: str, crumbs: list[tuple[str, str]], **values) -> str:
    """A page that isn't a notebook, from a template; `here` is its own address among the crumbs (address, text)."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "fluxnb"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return dress(environment.get_template(template).render(style=style_sheet(), crumbs=crumbs, here=here, **values))


def anew(text: str, rows=(), command: str = "", stem: str = "") -> str:
    """A page that stands already in today's style, with today's tables; see fluxnb.report.tables.dress."""
    style = f"<style>\n{style_sheet()}\n</style>"
    return dress(re.sub(r"<style>.*?</style>", lambda _: style, text, count=1, flags=re.DOTALL), rows, command, stem)


@functools.cache
def _exporter():
    """The one for all pages: to make it reads templates."""
    from nbconvert.exporters import HTMLExporter, TemplateExporter
    from nbconvert.filters import Highlight2HTML
    from traitlets.config import Config

    class Exporter(HTMLExporter):
        """HTMLExporter less its last step, which gives images without a description a made-up one."""

        def from_notebook_node(self, nb, resources=None, **kw):
            self.register_filter("highlight_code", Highlight2HTML(pygments_lexer="python", parent=self))
            return TemplateExporter.from_notebook_node(self, nb, resources, **kw)

    config = Config()
    config.NbConvertBase.display_data_priority = SHOWN
    config.CoalesceStreamsPreprocessor.enabled = True
    return Exporter(template_name="fluxnb", extra_template_basedirs=[str(TEMPLATES)], config=config)


# --- cells -----------------------------------------------------------------------------------------------


def _with_ids(markup: str, contents: list[dict], used: set[str]) -> str:
    """Give each heading an id that is unique on the page, and note it for the table of contents."""

    def heading(match: re.Match) -> str:
        level, inner = int(match.group(1)), match.group(2)
        inner = re.sub(r'<a class="anchor-link".*?</a>', "", inner).strip()
        plain = html.unescape(re.sub(r"<[^>]+>", "", inner))
        slug = base = re.sub(r"[^\w]+", "-", plain.lower()).strip("-") or "section"
        count = 1
        while slug in used:
            count += 1
            slug = f"{base}-{count}"
        used.add(slug)
        if level <= 3:
            contents.append({"level": level, "id": slug, "html": re.sub(r"</?a\b[^>]*>", "", inner)})
        return f'<h{level} id="{html.escape(slug)}">{inner}</h{level}>'

    return re.sub(r"<h([1-6])\b[^>]*>(.*?)</h\1>", heading, markup, flags=re.DOTALL)


def _readable_outputs(outputs: list, root: Path):
    for output in outputs:
        if output.output_type == "stream":
            output.text = _clean_stream(output.text, root)
            if not output.text.strip():
                continue
        elif output.output_type == "error":
            output.traceback = [_clean_text(line, root) for line in output.traceback]
            output.evalue = _clean_text(output.evalue, root)
        elif not _shown(output, root):
            continue
        yield output


def _shown(output, root: Path) -> bool:
    """Reduce a displayed output to what a page can show; False if nothing is left."""
    from nbconvert.filters import markdown2html

    widget = WIDGET in output.data
    for kind in list(output.data):
        if kind not in SHOWN:
            del output.data[kind]
    if widget and "text/html" not in output.data:
        return False  # its text form is only the name of a Python object
    if "text/markdown" in output.data:
        output.data.setdefault("text/html", markdown2html(output.data.pop("text/markdown")))
    if "text/html" in output.data:
        output.data["text/html"] = clean("".join(output.data["text/html"]))
    if "text/plain" in output.data:
        output.data["text/plain"] = _clean_text(output.data["text/plain"], root)
    return bool(output.data)


def _clean_stream(text: str, root: Path) -> str:
    """Text as a terminal would leave it: the last state of a line redrawn with \\r, no progress bars."""
    lines = []
    for line in _clean_text(text, root).replace("\r\n", "\n").split("\n"):
        final = line.rstrip("\r").rpartition("\r")[2]
        if not PROGRESS_BAR.search(line):
            lines.append(final.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _clean_text(text: str, root: Path) -> str:
    """Without terminal colours and without the folders of the machine it ran on."""
    text = ANSI.sub("", text)
    imported = [path for path in sys.path if Path(path).is_absolute() and len(Path(path).parts) > 2]
    for folder in sorted((str(root), *imported), key=len, reverse=True):  # the innermost first
        text = text.replace(f"{folder}{os.sep}", "")
    text = PACKAGES.sub("", text)
    home = str(Path.home())
    return text.replace(f"{home}{os.sep}", f"~{os.sep}") if home != os.sep else text
