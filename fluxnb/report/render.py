"""Turn executed notebooks into HTML pages that load nothing, and refuse a page that breaks that promise.

nbconvert does the conversion with the template in templates/fluxnb. Its stock templates load scripts from
the network and drop descriptions of images, so ours starts from nbconvert's structure only.
"""

import html
import json
import os
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.measure import telemetry
from fluxnb.report import (
    PAGES,
    build_dir,
    count_rows,
    executed_notebook,
    read_json,
    read_state,
    report_dir,
    sources,
    write_atomic,
)
from fluxnb.report.html import provenance_html
from fluxnb.report.run import describe_failure

TEMPLATES = Path(__file__).parent / "templates"
MAX_PAGE_MB = 15.0
WIDGET = "application/vnd.jupyter.widget-view+json"
# Only what can be shown without a script of ours; of several forms of one output, the first is taken.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
# A progress bar as tqdm draws it: "37%|███▋      | 37/100 [00:01<00:02, 30.1it/s]", "12it [00:03, 4.0it/s]".
PROGRESS_BAR = re.compile(r"\d+%\||\d+(it|B|k|M)? \[\d+:\d\d")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MODULES = "|".join(re.escape(name.replace("-", "_")) for name in telemetry.PACKAGES)
# where an environment happens to be, on this machine or on the one that the page was run on
PACKAGES = re.compile(rf"(?:/[^\s/:'\"]+)+/(?=(?:(?:site|dist)-packages|{_MODULES})/)")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")


@dataclass
class Page:
    """One report: what its navigation, its header and the index say about it."""

    stem: str
    title: str
    status: str  # "ok", "failed", "interrupted", "missing" or "unrendered"
    state: dict = field(default_factory=dict)
    rows: int = 0
    finding: str = ""  # the sentence of the first result callout, plain text
    problem: str = ""  # why the page isn't ok, plain text

    @property
    def href(self) -> str:
        return f"{self.stem}.html"


def render(params, root: Path = Path("."), max_page_mb: float = MAX_PAGE_MB) -> list[Path]:
    """Render every executed notebook of a configuration and its index; the paths written, index last.

    Needs no GPU and executes nothing. All pages that can be rendered are, then a UserError names those that
    can't: an image without a description, something loaded from elsewhere, a page over `max_page_mb` MB. The
    older version of such a page is removed, so that it isn't taken for the new one.
    """
    from fluxnb.report import site
    from fluxnb.report.index import index_html

    root = Path(root).resolve()
    build, reports = build_dir(params, root), report_dir(params, root)
    run = read_json(reports / "run.json")
    notebooks = {s.stem: executed_notebook(build, s.stem) for s in sources(root, params.gpu.count)}
    if not any(notebooks.values()):
        raise UserError(
            f"No notebook of {params.name} has been executed yet; run 'make report GPU={params.name}' first."
        )
    rows = count_rows(reports / "results.csv")
    pages = [_page(stem, path, read_state(build, stem), rows.get(stem, 0)) for stem, path in notebooks.items()]
    recalled = _recall(pages, reports)
    linked = [page for page in pages if page.status != "missing"]
    written, problems = [], []
    for position, page in enumerate(linked):
        target = reports / page.href
        around = {
            "previous": linked[position - 1] if position else None,
            "next": linked[position + 1] if position + 1 < len(linked) else None,
        }
        if page.stem in recalled:
            _write_changed(target, _dressed(target.read_text(encoding="utf-8"), around))
            continue
        try:
            text = page_html(notebooks[page.stem], page, run, params.name, root, around)
            check_page(text, page.stem, max_page_mb)
        except UserError as error:
            page.status, page.problem = "unrendered", str(error)
            problems.append(str(error))
            target.unlink(missing_ok=True)
            continue
        _write_changed(target, text)
        written.append(target)
    _remember(pages, reports)
    index = reports / "index.html"
    site.write_explorer(params.name, reports, build)
    above = "../" * len(params.report_dir.parts[1:]) + "index.html"
    explorer = site.EXPLORER if (reports / site.EXPLORER).is_file() else None
    text = index_html(pages, run, params.name, above, explorer)
    check_page(text, "index", max_page_mb)
    _write_changed(index, text)
    site.write_progress(params.name, reports, pages)
    site.write_site(root)
    if problems:
        raise UserError(" ".join(problems))
    return [*written, index]


def _remember(pages: list[Page], reports: Path) -> None:
    """Writes what the index says of each page beside the pages, for clones that have the pages only."""
    kept = {}
    for page in pages:
        if page.status in ("ok", "failed", "interrupted"):
            commit = page.state.get("provenance", {}).get("commit")
            state = {name: page.state.get(name) for name in ("seconds", "started", "finished")}
            facts = {name: getattr(page, name) for name in ("title", "status", "finding", "problem")}
            kept[page.stem] = facts | {"state": state | {"provenance": {"commit": commit}}}
    _write_changed(reports / PAGES, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _recall(pages: list[Page], reports: Path) -> set[str]:
    """Takes pages that came with the repository where none was executed here, or an earlier one; which these are."""
    kept, recalled = read_json(reports / PAGES), set()
    for page in pages:
        facts = kept.get(page.stem)
        if facts and (reports / page.href).is_file() and _is_later(facts["state"], page):
            recalled.add(page.stem)
            for name, value in facts.items():
                setattr(page, name, value)
    return recalled


def _is_later(state: dict, page: Page) -> bool:
    """Whether a page of this state was executed after the one here, if there is one here."""
    when = "started" if state.get("started") else "finished"  # a page made anew finished when its rows were measured
    return page.status == "missing" or (state.get(when) or "") > (page.state.get(when) or "")


def _dressed(text: str, around: dict) -> str:
    """A page that was rendered before, in today's style and with links to its neighbours of today."""
    steps, onward = _navigation(around)
    for pattern, new in (
        (r"<style>\n.*?\n</style>", f"<style>\n{style_sheet()}\n</style>"),
        (r'<span class="steps">.*?\n</span>(?=\n</nav>)', steps),
        (r'<nav aria-label="Continue">.*?</nav>', onward),
    ):
        text = re.sub(pattern, lambda _, new=new: new, text, count=1, flags=re.DOTALL)
    return text


def _navigation(around: dict) -> tuple[str, str]:
    """The links to a page's neighbours above and below it."""
    found = {kind: (html.escape(page.href), html.escape(page.title)) for kind, page in around.items() if page}
    above, below = '<span class="steps">', '<nav aria-label="Continue">'
    if "previous" in found:
        href, title = found["previous"]
        above += f'\n<a rel="prev" href="{href}" aria-label="Previous: {title}">← <span>{title}</span></a>'
        below += f'<a rel="prev" href="{href}">← {title}</a>'
    below += '\n<a href="index.html">All reports</a>'
    if "next" in found:
        href, title = found["next"]
        above += f'\n<a rel="next" href="{href}" aria-label="Next: {title}"><span>{title}</span> →</a>'
        below += f'<a rel="next" href="{href}">{title} →</a>'
    return above + "\n</span>", below + "\n</nav>"


def page_html(notebook: Path, page: Page, run: dict, gpu: str, root: Path, around: dict | None = None) -> str:
    """The HTML of one executed notebook, not yet checked.

    around  {"previous": Page | None, "next": Page | None} for the navigation
    """
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    contents = prepare(content, root)
    strip = provenance_html(page.state.get("provenance") or run, page.rows or None)
    steps, onward = _navigation(around or {})
    facts = {"page": page, "gpu": gpu, "contents": contents, "provenance": strip, "style": style_sheet()}
    resources = {"metadata": {"name": page.stem}, "fluxnb": facts | {"steps": steps, "onward": onward}}
    text, _ = _exporter().from_notebook_node(content, resources)
    return _without_secrets(text)


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
    contents, used, title_taken = [], set(), False
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


def check_page(text: str, name: str, max_mb: float = MAX_PAGE_MB) -> None:
    """UserError unless a page is small enough, describes every image, and loads nothing from elsewhere."""
    size = len(text.encode()) / 1e6
    if size > max_mb:
        raise UserError(
            f"The report {name} is {size:.1f} MB, more than the {max_mb:g} MB allowed; "
            "show fewer or smaller images in it."
        )
    audit = _Audit()
    audit.feed(text)
    audit.close()
    if audit.undescribed:
        raise UserError(
            f"The report {name} has an image without alt text in {audit.undescribed[0]}; show figures with "
            "fluxnb.report.html.figure(fig, alt=…), which asks for one."
        )
    if audit.loads:
        where, what = audit.loads[0]
        raise UserError(
            f"The report {name} would load {what[:120]!r} in {where}; a report has to stand alone, "
            "so embed it as a data URI."
        )


def style_sheet() -> str:
    """The CSS of all pages."""
    return (TEMPLATES / "fluxnb" / "style.css").read_text(encoding="utf-8")


def render_template(template: str, here: str, crumbs: list[tuple[str, str]], **values) -> str:
    """A page that isn't a notebook, from a template; `here` is its own address among the crumbs (address, text)."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "fluxnb"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(style=style_sheet(), crumbs=crumbs, here=here, **values)


# --- pages -----------------------------------------------------------------------------------------------


def _page(stem: str, notebook: Path | None, state: dict, rows: int) -> Page:
    if notebook is None:
        return Page(stem, _title(None, stem), "missing", state, rows, problem="not run yet")
    content = read_json(notebook)
    page = Page(stem, _title(content, stem), "ok", state, rows, _finding(content))
    if notebook.name.endswith(".failed.ipynb"):
        page.status, page.problem = "failed", describe_failure(state)
    elif state.get("status") != "ok":
        page.status = "interrupted"
        page.problem = "the last run was interrupted; this page is from the run before it"
    return page


def title_of(source: Path) -> str:
    """The title of a notebook: its first heading."""
    return _title(read_json(source), source.stem)


def _title(content: dict | None, stem: str) -> str:
    for cell in (content or {}).get("cells", []):
        if cell.get("cell_type") == "markdown":
            heading = re.search(r"^#\s+(.+?)\s*#*$", "".join(cell.get("source", "")), flags=re.MULTILINE)
            if heading:
                return re.sub(r"[`*_]{1,2}(?=\S)(.+?)[`*_]{1,2}", r"\1", heading.group(1))
    return stem.partition("_")[2].replace("_", " ").capitalize() or stem


def _finding(content: dict) -> str:
    for cell in content.get("cells", []):
        for output in cell.get("outputs", []):
            markup = "".join(output.get("data", {}).get("text/html", ""))
            found = re.search(r'<div class="fx-callout fx-result".*?<p class="fx-label">.*?</p><p>(.*?)</p>', markup)
            if found:
                return html.unescape(re.sub(r"<[^>]+>", "", found.group(1)))
    return ""


def _exporter():
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


def _write_changed(path: Path, text: str) -> None:
    """Write a page, but leave the file alone when it says the same already."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass
    write_atomic(path, text)


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
    widget = WIDGET in output.data
    for kind in list(output.data):
        if kind not in SHOWN:
            del output.data[kind]
    if widget and "text/html" not in output.data:
        return False  # its text form is only the name of a Python object
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


def _without_secrets(text: str) -> str:
    """A token must not be published, however it came into an output."""
    for name in TOKEN_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return TOKEN.sub("[token removed]", text)


# --- the promise -----------------------------------------------------------------------------------------

# Attributes that make a browser fetch something. <a href> doesn't: it is the reader's own step.
LOADING = {
    "img": ("src", "srcset"),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "script": ("src",),
    "link": ("href",),
    "iframe": ("src",),
    "frame": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "input": ("src",),
    "base": ("href",),
    "body": ("background",),
}
CSS_LOAD = re.compile(r"""url\(\s*['"]?([^'")]*)|@import\s+['"]([^'"]+)""", re.IGNORECASE)


class _Audit(HTMLParser):
    """Collects images without a description and everything a page would load, each with its place."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.undescribed: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self._where = "the page's frame"
        self._in_style = False

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        if "data-cell" in values:
            self._where = f"cell {values['data-cell']}"
        if tag == "img" and not values.get("alt", "").strip():
            self.undescribed.append(self._where)
        for name in LOADING.get(tag, ()):
            self._load(values.get(name, ""))
        if tag == "meta" and values.get("http-equiv", "").lower() == "refresh":
            self._load(values.get("content", ""))
        self._css(values.get("style", ""))
        self._in_style = tag == "style"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._in_style = False

    def handle_endtag(self, tag):
        if tag == "style":
            self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self._css(data)

    def _css(self, text: str) -> None:
        for match in CSS_LOAD.finditer(text):
            self._load(match.group(1) or match.group(2) or "")

    def _load(self, target: str) -> None:
        target = target.strip()
        if target and not target.startswith(("data:", "#", "about:blank")):
            self.loads.append((self._where, target))
