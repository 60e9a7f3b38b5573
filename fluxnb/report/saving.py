"""What JupyterLab, as `make explore` starts it, saves of the study's notebooks: what was written, not what was run.

So the files stay as git has them, whatever is run. What is shown stays in the browser until it is closed; `make report
ONLY=…` makes a page to keep.
"""

from __future__ import annotations

from pathlib import Path

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FOLDER, KEPT = "notebooks", ("tags",)


def before_saving(model: dict, path: str, contents_manager) -> None:
    """Jupyter's pre_save_hook: takes outputs, counts and what Jupyter notes out of a notebook that is saved."""
    folder = Path(contents_manager.root_dir, path.strip("/")).parent.name  # the server's root may be that folder itself
    if model["type"] != "notebook" or not model.get("content") or folder != FOLDER:
        return
    model["content"]["metadata"] = METADATA
    for cell in model["content"]["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name in KEPT}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
