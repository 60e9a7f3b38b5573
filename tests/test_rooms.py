"""The rooms of the library: what may import what, how large they are, and where names are spelled."""

import ast
import inspect
import json
from pathlib import Path

import pytest

from fluxnb import families, notebooks, stacks, techniques
from fluxnb.study import Study

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fluxnb"
# From the top to the ground; a room imports from those below it. Of those on one line none imports the other.
ROOMS = [
    {"__main__"},
    {"report"},
    {"explore"},
    {"findings"},
    {"study"},
    {"params"},
    {"recipes"},
    {"rebuilt"},
    {"stacks"},
    {"techniques"},
    {"cache"},
    {"training"},
    {"measure"},
    {"models"},
    {"world"},
    {"adapters"},
    {"technique"},
    {"families"},
    {"notebooks"},
    {"installed"},
    {"errors", "leftovers", "scrub"},
    {"fluxnb", "_setup"},
]
MOST_LINES, MOST_LINES_OF_STUDY = 500, 250
LARGE = {"fluxnb/world/scenes.py"}  # the grammar


def sources() -> dict[str, Path]:
    """Module by its full name -> its file."""
    found = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def room(module: str) -> str:
    """The package or module below fluxnb that a module is in."""
    return (module.split(".") + ["fluxnb"])[1] if module != "fluxnb" else "fluxnb"


def imported(name: str) -> set[str]:
    """The modules of fluxnb that a module imports, inside functions too; of a package what is taken from it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            own = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {full if full in SOURCES else node.module for full in own}
    return {module for module in found if module in SOURCES} - {name}


IMPORTS = {name: imported(name) for name in SOURCES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of a circle in a graph, empty without one."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for other in sorted(graph[node]):
            if found := visit(other):
                return found
        path.pop()
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node))), [])


def test_every_module_is_in_a_room_of_the_drawing():
    rooms = set().union(*ROOMS)
    assert {room(name) for name in SOURCES} == rooms


def test_imports_run_downwards():
    floor = {name: i for i, level in enumerate(ROOMS) for name in level}
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if room(name) != room(other) and floor[room(name)] >= floor[room(other)]
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    assert circle(IMPORTS) == []


def test_no_rooms_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {room(name): set() for name in SOURCES}
    for name, others in IMPORTS.items():
        graph[room(name)] |= {room(other) for other in others} - {room(name)}
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES.values()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert set(long) == LARGE, long
    assert len(inspect.getsource(Study).splitlines()) < MOST_LINES_OF_STUDY


# --- names are spelled in one place ---------------------------------------------------------------------------

# Where names are defined: records, named stacks, the techniques' own classes, the gates.
PLACES = (
    "fluxnb.families",
    "fluxnb.rebuilt",
    "fluxnb.stacks",
    "fluxnb.notebooks",
    "fluxnb.techniques",
    "fluxnb.cache.gates.",
)
# Words that are a name of something as well, and where they are written as what else they are.
WORDS = {
    "all": {"report.analysis", "report.console"},  # pandas' how; a word
    "baseline": {"explore", "report.explorer", "report.grids", "report.rows",
                 "study.comparison", "study.spreading"},
    "blocks": {"report.catalogue", "report.front"},  # of a page
    "bytes": {"findings.rows", "measure.ceilings"},  # how many are moved, in settings
    "compiled": {"params.schema", "study.comparison"},  # a parameter; a folder; what is in a proof
    "phase": {"findings.phases"},  # a column's heading
    "published": {"report.decisions"},  # TeaCache's polynomial
    "quantization": {"findings.single_gpu", "installed", "params.schema", "recipes"},  # a setting, a parameter
    "quantized": {"params.schema"},  # a parameter
    "stack": {"report.recipes", "study.candidate", "study.kept", "study.study", "study.trials"},  # a column
    "transformer": {  # a part of a pipeline
        "cache.engine", "findings.trained", "models.facts", "models.flux2", "models.folders", "models.full_size",
        "models.pipelines", "study.bench", "technique", "training.train", "training.train_schnell",
    },
    "VAE": {"findings.parallel"},  # a stage
}  # fmt: skip
WORDS_OF_NOTEBOOKS = {"bytes", "transformer"}  # settings


def literals(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of every string literal but docstrings; of f-strings their constant parts."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


STEMS = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def names() -> set[str]:
    """The name of every family, every technique that has a fixed one, every stack and every notebook."""
    found = {family.name for family in families.ALL} | STEMS
    for name, value in vars(stacks).items():
        found |= ({value} if isinstance(value, str) else set(value)) if name.isupper() else set()
    for technique in techniques.__all__:
        own = inspect.getattr_static(getattr(techniques, technique), "name", None)
        found |= {own} if isinstance(own, str) else set()
    return found - {"explore"}  # the command's name as well


def test_the_names_that_are_looked_for_are_all_that_there_are():
    found = names()
    assert {
        "First Block Cache",
        "context parallel",
        "+ VAE compiled",
        "Ulysses",
        "12_load",
        "second-order solver",
    } <= found
    constants = {value for name, value in vars(notebooks).items() if name.isupper() and isinstance(value, str)}
    assert constants | {"explore"} == STEMS | {"explore"}
    assert len(found) > 90


def test_no_name_is_spelled_outside_the_place_that_defines_it():
    wanted, strangers, used = names(), [], set()
    for name in SOURCES:
        if name.startswith(PLACES):
            continue
        for line, text in literals(TREES[name]):
            own = name.removeprefix("fluxnb.")
            if text in WORDS and own in WORDS[text]:
                used.add((text, own))
            elif text in wanted or any(stem in text for stem in STEMS - {"explore"}):
                strangers.append(f"{name}:{line} {text!r}")
    assert not strangers
    assert used == {(text, own) for text, modules in WORDS.items() for own in modules}  # none isn't written any more


def test_no_name_is_compared_with_outside_the_place_that_defines_it():
    """A word that may be written as something else can't be asked for as a name: row.family == "baseline"."""
    wanted = names()
    asked = [
        f"{name}:{node.lineno} {text!r}"
        for name in SOURCES
        if not name.startswith(PLACES)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
        for operand in (node.left, *node.comparators)
        for text in (ast.unparse(operand).strip("'\""),)
        if text in wanted
    ]
    assert not asked


def code_cells(path: Path) -> list[ast.AST]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [ast.parse("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_spells_no_name_but_its_own(path):
    wanted, found = names() - WORDS_OF_NOTEBOOKS, []
    for cell in code_cells(path):
        found += [
            text for _, text in literals(cell) if text in wanted or any(stem in text for stem in STEMS - {"explore"})
        ]
    begins = [
        node
        for cell in code_cells(path)
        for node in ast.walk(cell)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "study.begin"
    ]
    assert found == ([] if path.stem == "explore" else [path.stem])
    assert [text for node in begins for _, text in literals(node)] == found
