"""What programs read: every committed row as JSON with a schema, and llms.txt, which says what is where."""

from __future__ import annotations

import json
from pathlib import Path

from fluxnb.findings import ledger
from fluxnb.report import TABLE, contributed, history, write_changed
from fluxnb.report.configurations import Configuration
from fluxnb.report.front import headlines, machine
from fluxnb.report.ledger import entries
from fluxnb.scrub import scrubbed
from fluxnb.study.results import Results
from fluxnb.study.row import FIELDS, STATUSES, WEIGHTS

DATA, SCHEMA, LLMS, FORMAT = "data.json", "data.schema.json", "llms.txt", 1
_TYPES: dict[str, dict] = {
    "text": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "dict": {"type": "object"},
    "list": {"type": "array", "items": {"type": "number"}},
    "time": {"type": "string", "format": "date-time"},
}
_CHOICES = {"status": STATUSES, "weights": WEIGHTS}


def schema() -> dict:
    """The JSON Schema of data.json: every column with its meaning, made of `study.row.Row`."""
    columns = {
        name: _TYPES[f.metadata["kind"]]
        | {"description": f.metadata["help"]}
        | ({"enum": list(_CHOICES[name])} if name in _CHOICES else {})
        for name, f in FIELDS.items()
    }
    columns["id"] = columns["id"] | {"pattern": "^[0-9a-f]{10}$"}
    own = {
        "configuration": {"type": "string", "description": "a name of `configurations`"},
        "shown": {"type": "boolean", "description": "whether pages show it; false: measured again since, or elsewhere"},
    }
    row_needs = ["id", "configuration", "shown", "notebook", "technique", "gpu", "status", "weights", "versions"]
    row = {"type": "object", "additionalProperties": False, "required": row_needs, "properties": own | columns}
    place = {name: {"type": "string"} for name in ("folder", "machine")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fluxnb's committed measurements; a column that is empty is left out",
        "type": "object",
        "additionalProperties": False,
        "required": ["format", "license", "configurations", "rows"],
        "properties": {
            "format": {"const": FORMAT},
            "license": {"type": "string"},
            "configurations": {
                "type": "object",
                "additionalProperties": {"type": "object", "required": list(place), "properties": place},
            },
            "rows": {"type": "array", "items": row},
        },
    }


def data(root: Path, found: list[Configuration]) -> dict:
    """Every row of the committed tables, in their order."""
    places, rows = {}, []
    for c in found:
        every = Results(c.folder / TABLE).rows()
        shown = {r.id for r in ledger.latest(every)}
        places[c.name] = {"folder": c.folder.relative_to(root / "reports").as_posix(), "machine": machine(c)}
        for row in every:
            columns = {n: v for n, v in row.as_dict().items() if v is not None}
            rows.append({"id": row.id, "configuration": c.name, "shown": row.id in shown} | columns)
    return scrubbed({"format": FORMAT, "license": "Apache-2.0", "configurations": places, "rows": rows})


def as_json(whole: dict) -> str:
    """A line for each row, so that what changes is a line. Raises ValueError for what JSON can't hold, as NaN."""
    rows = ",\n".join(
        json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for row in whole["rows"]
    )
    head = json.dumps({k: v for k, v in whole.items() if k != "rows"}, ensure_ascii=False, allow_nan=False)
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def llms(root: Path, found: list[Configuration]) -> str:
    """What a language model, or whoever reads plain text, should know first: the answers and where the rest is."""
    about = "> Which accelerations to switch on for FLUX text-to-image inference, on which GPU, and what they cost in "
    about += "image quality: measured, with every row kept."
    lines = ["# fluxnb", "", about, "", "## What to switch on", ""]
    lines += [f"- {sentence}" for sentence in headlines(found)] or ["- Nothing is measured yet."]
    claims, others = ledger.sentence(entries(found)), contributed.sentence(root / "reports", found)
    stand_in = "Figures of random weights are about time and memory only; quality is that of a small stand-in model."
    lines += ["", stand_in, f"{claims} {others}", "", "## Where", ""]
    there = (
        ("index.html", "the front page"),
        ("ledger.html", "published claims with verdicts"),
        (DATA, f"every committed row with its id; its schema is {SCHEMA}"),
        (history.TEXT, "what changed since"),
        (f"{contributed.FOLDER}/{contributed.PAGE}", "other people's rows beside ours"),
    )
    lines += [f"- [{name}]({name}): {what}" for name, what in there]
    for c in found:
        where = c.folder.relative_to(root / "reports").as_posix()
        lines.append(f"- [{c.name}]({where}/index.html): {machine(c)}, {len(c.ok)} measured rows")
    lines += ["", "## Commands", "", "- `make report GPU=h100`: measure on your machine",
              "- `python -m fluxnb recipe --gpu h100 --goal balanced`: the code to copy",
              "- `python -m fluxnb rows ID`: everything about a row"]  # fmt: skip
    return "\n".join(lines).replace("**", "") + "\n"


def write(root: Path, found: list[Configuration]) -> list[Path]:
    """data.json, its schema and llms.txt below reports/; their paths."""
    texts = {
        DATA: as_json(data(root, found)),
        SCHEMA: json.dumps(schema(), indent=1, ensure_ascii=False) + "\n",
        LLMS: llms(root, found),
    }
    for name, text in texts.items():
        write_changed(root / "reports" / name, text)
    return [root / "reports" / name for name in texts]
