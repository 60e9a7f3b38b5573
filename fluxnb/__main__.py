"""The command line: `python -m fluxnb report --gpu cpu`. `make help` lists the everyday commands."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fluxnb import params
from fluxnb.errors import UserError


def report(options) -> int:
    """Runs what has changed, then renders every page."""
    from fluxnb.measure import telemetry
    from fluxnb.models import pipelines
    from fluxnb.report import sweep
    from fluxnb.report.render import render
    from fluxnb.report.run import run
    from fluxnb.study.results import Results

    chosen, root = params.load(options.gpu), params.find_folder().parent
    if options.replay:
        os.environ[telemetry.REPLAY] = str(_recorded(chosen.name, root / chosen.report_dir))
    elif options.launch != "slurm":  # a job looks by itself what it was given
        name, count = params.detect_gpu()
        params.check_gpu(chosen, name, force=options.force, detected_count=count)
    Results(root / chosen.report_dir / "results.csv").rows()  # a damaged table is said before anything starts
    for model in chosen.study.models:
        pipelines.check(model)
    if options.force:
        os.environ["FLUXNB_FORCE"] = "1"
    several = not options.replay and (options.launch != "here" or sweep.places(chosen) != [None])
    status = run(
        chosen,
        provenance=lambda: telemetry.provenance(chosen, root),
        only=options.only,
        force=options.force or options.replay,
        replay=options.replay,
        root=root,
        jobs=(lambda stems: sweep.sweep(chosen, root, stems, options.launch, options.force)) if several else None,
    )
    _say_where(render(chosen, root))
    return status


def _recorded(gpu: str, folder: Path) -> Path:
    """The run.json of a configuration that was measured."""
    file = folder / "run.json"
    if not file.is_file():
        raise UserError(
            f"Nothing was measured for GPU={gpu} yet, so there is nothing to replay: run it on its GPU first."
        )
    return file.resolve()


def render_again(options) -> int:
    """Renders the notebooks that were run last; needs no GPU."""
    from fluxnb.report.render import render

    _say_where(render(params.load(options.gpu), params.find_folder().parent))
    return 0


def make_site(options) -> int:
    """The front page, the ledger, indexes and progress files, from the committed tables."""
    from fluxnb.report import site

    root = params.find_folder().parent
    for found in site.configurations(root):
        site.write_progress(found.name, found.folder, found.pages)
        site.write_index(root, found)
    site.write_readme(root)
    _say_where(site.write_site(root)[:1])
    return 0


def analysis(options) -> int:
    """Configurations beside each other: speedups, and what an image costs."""
    from fluxnb.report.analysis import write

    _say_where(write(params.find_folder().parent, options.prices))
    return 0


def clean_caches(options) -> int:
    """Lists downloaded models and compiled code with their sizes, asks, and deletes what was agreed to."""
    from fluxnb.report import disk

    try:
        disk.clean(params.find_folder().parent)
    except EOFError:
        raise UserError("Nothing was deleted: run it in a terminal, where it can ask.") from None
    return 0


def fit_teacache(options) -> int:
    """Fits TeaCache's polynomial to a model's own trajectories."""
    from fluxnb import study
    from fluxnb.cache import teacache
    from fluxnb.models import embedded

    s = study.begin(options.gpu, "fit-teacache")
    subject = s.subject(options.model)
    if not subject.model.judged:
        raise UserError(f"{options.model} has random weights, whose trajectories say nothing: name a trained model.")
    result = teacache.fit(subject, options.steps)
    print(f"coefficients, highest power first: {', '.join(f'{c:.6g}' for c in result.coefficients)}")
    print(f"R² {result.r2:.3f} over {len(result.changes)} steps of {result.images} images")
    folder = embedded.FOLDER if options.model == "embedded" else Path(options.model).expanduser()
    if folder.is_dir():
        print(f"written to {teacache.save(result, folder)}")
    return 0


def list_params(options) -> int:
    """Every parameter: what it means and what is allowed."""
    for key in params.describe():
        print(f"{key.path}: {key.help}\n    {key.type}; allowed: {key.allowed}; default: {key.default}")
    return 0


def _say_where(pages: list[Path]) -> None:
    if pages:
        print(f"read it: {pages[-1]}")


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a notebook failed; 2: something the user can put right, said in one sentence."""
    parser = argparse.ArgumentParser(prog="fluxnb", description="A reproducible study of fast FLUX inference.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, words in (
        ("report", report, "run the notebooks that changed and render the reports"),
        ("render", render_again, "render the reports again, without running anything"),
        ("site", make_site, "make the front page, the ledger and the progress files again"),
        ("analysis", analysis, "set configurations beside each other"),
        ("clean-caches", clean_caches, "list downloaded models and compiled code, and delete what you agree to"),
        ("fit-teacache", fit_teacache, "fit TeaCache's polynomial to a model"),
        ("params", list_params, "list every parameter"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.set_defaults(run=run)
        if name in ("report", "render", "fit-teacache"):
            command.add_argument("--gpu", default="cpu", help="a configuration: the name of a file in params/")
        if name == "report":
            command.add_argument("--only", action="append", help="a notebook, by name or number; may be repeated")
            command.add_argument("--force", action="store_true", help="run all of it again, on any GPU")
            command.add_argument(
                "--replay",
                action="store_true",
                help="make pages anew from the rows that are there, on any machine; measures nothing",
            )
            command.add_argument(
                "--launch",
                default="here",
                help="here: a notebook per free GPU of this machine; slurm: as Slurm's jobs",
            )
        if name == "analysis":
            command.add_argument("prices", nargs="*", help="what a GPU hour costs, such as h200=3.5")
        if name == "fit-teacache":
            command.add_argument("--model", default="embedded", help="a model by name")
            command.add_argument("--steps", type=int, default=28, help="denoising steps")
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"fluxnb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fluxnb: interrupted; what was finished is kept, and the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
