"""What is saved of the study's notebooks, and what git sees of them: what was written, not what was run.

So the files stay as git has them, whatever is run: JupyterLab, as `make explore` starts it, saves them so, and for
other editors this module is git's filter. What is shown stays in the browser until it is closed; `make report ONLY=…`
makes a page to keep.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FOLDER, KEPT = "notebooks", ("tags",)


def before_saving(model: dict, path: str, contents_manager) -> None:
    """Jupyter's pre_save_hook: takes outputs, counts and what Jupyter notes out of a notebook that is saved."""
    folder = Path(contents_manager.root_dir, path.strip("/")).parent.name  # the server's root may be that folder itself
    if model["type"] == "notebook" and model.get("content") and folder == FOLDER:
        clean(model["content"])


def clean(notebook: dict) -> None:
    """Takes outputs, counts and what Jupyter notes out of a notebook."""
    notebook["metadata"] = METADATA
    for cell in notebook["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name in KEPT}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None


def main() -> None:
    """Git's filter: the notebook on standard input without what was run; what is none as it is."""
    given = sys.stdin.buffer.read()
    try:
        clean(notebook := json.loads(given))
        given = (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    sys.stdout.buffer.write(given)


if __name__ == "__main__":
    main()
