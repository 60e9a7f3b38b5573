"""The command line: `python -m fluxnb report --gpu cpu`. `make help` lists the everyday commands.

Nothing but the standard library is imported before a command runs: an interpreter that lacks packages is told so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from fluxnb import leftovers, scrub
from fluxnb.errors import UserError, lacks_memory


def report(options) -> int:
    """Runs what has changed, then renders every page."""
    from fluxnb.report import preflight

    preflight.check()
    from fluxnb.report import publish

    chosen, root = _chosen(options)
    return publish.report(chosen, root, options.only, options.force, options.replay, options.launch)


def render(options) -> int:
    """Renders the notebooks that were run last; needs no GPU."""
    from fluxnb.report import publish

    return _say_where(publish.render(*_chosen(options)))


def reference(options) -> int:
    """Takes a run of one's own over into the committed reference."""
    from fluxnb.report import publish

    return _say_where(publish.to_reference(*_chosen(options)))


def site(options) -> int:
    """The front page, the ledger, indexes and progress files, from the committed tables."""
    from fluxnb.report import publish

    return _say_where(publish.site(_root()))


def contribute(options) -> int:
    """Packs a user's own rows into one file, after saying what is in it."""
    from fluxnb.report import contributed
    from fluxnb.report import own as place_of

    path = contributed.contribute(place_of(*_chosen(options)), options.name, options.to, options.yes)
    return 0 if path is None else _say_where(path)


def merge(options) -> int:
    """Checks what somebody else contributed and shows it beside the reference, as theirs."""
    from fluxnb.report import publish

    return _say_where(publish.merge(_root(), Path(os.path.expanduser(options.file))))


def analysis(options) -> int:
    """Configurations beside each other: speedups, and what an image costs."""
    root = _root()
    from fluxnb.report.analysis import write

    return _say_where(write(root, options.prices)[-1])


def rows(options) -> int:
    """One row with everything about it, or a list of rows."""
    from fluxnb.report import rows as tables

    if options.documents:
        print(tables.of_documents(_root()))
    elif options.id:
        print(tables.one(_root(), options.id))
    else:
        print(tables.listed(_root(), options.notebook, options.gpu, options.technique))
    return 0


def recipe(options) -> int:
    """A script that makes an image with what is recommended for a goal on a GPU."""
    from fluxnb import recipes
    from fluxnb.models import facts

    model = facts.of(options.model) if options.model else None
    found = recipes.find(f"{options.gpu}/{options.goal}", few=options.schnell, model=model)
    print(recipes.script(found, options.diffusers, model=model), end="")
    return 0


def techniques(options) -> int:
    """Every technique: what it is, its class, its notebook."""
    from fluxnb.report import catalogue

    print(catalogue.text())
    return 0


def clean_caches(options) -> int:
    """Lists downloaded models and compiled code with their sizes, asks, and deletes what was agreed to."""
    from fluxnb.report import disk

    try:
        disk.clean(_root())
    except EOFError:
        raise UserError("Nothing was deleted: run it in a terminal, where it can ask.") from None
    return 0


def fit_teacache(options) -> int:
    """Fits TeaCache's polynomial to a model's own trajectories."""
    from dataclasses import replace

    from fluxnb import study
    from fluxnb.cache import teacache
    from fluxnb.models import embedded
    from fluxnb.world import scenes

    _check_steps(options.steps)
    s = study.begin(options.gpu, "fit-teacache")
    subject = s.subject(options.model)
    if not subject.model.judged:
        raise UserError(f"{options.model} has random weights, whose trajectories say nothing: name a trained model.")
    if subject.model.small:  # what judges it is kept out of its polynomial, too
        prompts = tuple(scenes.training_scene(seed).caption for seed in range(teacache.PROMPTS))
        subject = replace(subject, prompts=prompts, seeds=subject.seeds[:1])
    else:
        subject = study.fitted.enough(subject, options.steps or s.steps(subject))
    result = teacache.fit(s.loaded(subject), options.steps or s.steps(subject))
    result = replace(result, prompts="training" if subject.model.small else "planning")
    print(f"coefficients, highest power first: {', '.join(f'{c:.6g}' for c in result.coefficients)}")
    print(f"R² {result.r2:.3f} over {len(result.changes)} steps of {result.images} images")
    folder = embedded.FOLDERS.get(options.model) or Path(os.path.expanduser(options.model))
    if folder.is_dir():
        print(f"written to {teacache.save(result, folder)}")
    return 0


def _check_steps(steps: int | None) -> None:
    if steps is not None and not 2 <= steps <= 200:
        raise UserError(f"--steps {steps} isn't allowed: give a whole number from 2 to 200.")


def plan(options) -> int:
    """Plans caches for a model: masks, weights and the quality to expect, from uncached images of its own."""
    from fluxnb import study
    from fluxnb.cache import planning
    from fluxnb.models import embedded
    from fluxnb.study import fitted

    _check_steps(options.steps)
    s = study.begin(options.gpu, "plan")
    subject = s.subject(options.model)
    if not subject.model.judged:
        raise UserError(f"{options.model} has random weights, whose steps say nothing: name a trained model.")
    folder = embedded.FOLDERS.get(options.model) or Path(os.path.expanduser(options.model))
    target = options.to or folder / planning.FILE
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder: say where the plans go with --to.")
    steps = options.steps or s.steps(subject)
    budgets = options.computed or [max(1, round(n * steps / 28)) for n in planning.BUDGETS]
    budgets = list(dict.fromkeys(budgets))
    plans = fitted.planned(s.loaded(subject), steps, budgets, options.annealing)
    for one in plans:
        print(f"{one.computed} of {steps}: {one.mask}, {one.predicted_db:.1f} dB expected of the mean image")
    print(f"written to {planning.save(plans, target)}")
    return 0


def export(options) -> int:
    """Writes a shipped model as a whole folder in diffusers' format."""
    from fluxnb.models import embedded

    embedded.export(options.name, Path(os.path.expanduser(options.folder)))
    few = f", num_inference_steps={embedded.SCHNELL_STEPS}" if options.name == embedded.SCHNELL else ""
    print(f"written; without fluxnb, diffusers.FluxPipeline.from_pretrained({str(options.folder)!r}) loads it:")
    print(f'pipe("a red apple on a white table", width=128, height=128, max_sequence_length={embedded.TOKENS}{few})')
    return 0


def list_params(options) -> int:
    """Every parameter: what it means and what is allowed; or the file of a GPU that has none yet."""
    from fluxnb import params

    if options.new is not None:
        from fluxnb.params import new

        print(f"written: {new.write(options.new, options.match, options.memory, _root() / 'params')}")
        return 0
    for key in params.describe():
        more = f"; with THOROUGH=1: {key.thorough}" * bool(key.thorough)
        print(f"{key.path}: {key.help}\n    {key.type}; allowed: {key.allowed}; default: {key.default}{more}")
    print(f"\n{params.reading.THOROUGH}: sections as above, laid over them by THOROUGH=1 (--thorough): what takes long")
    print(
        f"{params.reading.RANDOM}: the same for a model of random weights (MODEL=flux2-klein-random), which shows time"
    )
    return 0


def _root() -> Path:
    from fluxnb import params

    return params.find_folder().parent


def _chosen(options) -> tuple:
    """(Params, project's folder) of the configuration that was asked for, and of the model if one was."""
    from fluxnb import params
    from fluxnb.models import facts

    for variable, given in zip(facts.GIVEN, (options.model, options.size, options.tokens, options.steps), strict=True):
        if given is not None:
            os.environ[variable] = given
    if getattr(options, "thorough", False):
        os.environ[params.THOROUGH] = "1"
    chosen = params.chosen(options.gpu)
    if chosen.model:  # notebooks run in other folders
        os.environ[facts.MODEL] = chosen.model.name
    return chosen, _root()


def _say_where(page: Path) -> int:
    print(f"read it: {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fluxnb", description="A reproducible study of fast FLUX inference.")
    commands = parser.add_subparsers(required=True, metavar="command")
    made = {}
    for name, run, words in (
        ("report", report, "run the notebooks that changed and render your own reports, below reports/own/"),
        ("render", render, "render your own reports again, without running anything"),
        ("reference", reference, "take your own run of a configuration over into the committed reference"),
        ("contribute", contribute, "pack your own rows into one file for others, saying first what is in it"),
        ("merge", merge, "check what somebody else contributed and show it beside the reference, as theirs"),
        ("site", site, "make the front page, the ledger and the progress files again"),
        ("analysis", analysis, "set configurations beside each other"),
        ("rows", rows, "print a row with everything about it, or list rows"),
        ("recipe", recipe, "print a script that makes an image with what is recommended"),
        ("techniques", techniques, "list every technique"),
        ("clean-caches", clean_caches, "list downloaded models and compiled code, and delete what you agree to"),
        ("fit-teacache", fit_teacache, "fit TeaCache's polynomial to a model"),
        ("plan", plan, "plan caches for a model: which steps are computed, and what the others are made of"),
        ("export", export, "write a shipped model as a folder that diffusers loads without fluxnb"),
        ("params", list_params, "list every parameter, or write the file of a GPU that has none"),
    ):
        made[name] = commands.add_parser(name, help=words, description=words)
        made[name].set_defaults(run=run)
    for name in ("report", "render", "reference", "fit-teacache", "plan", "recipe", "contribute"):
        made[name].add_argument("--gpu", default="cpu", help="a configuration: the name of a file in params/")
    add = made["contribute"].add_argument
    add("--name", default="", help="how you want to be called on the page")
    add("--to", type=Path, help="the file to write; below reports/own/ by default")
    add("--yes", action="store_true", help="write it without asking")
    made["contribute"].set_defaults(model=None, size=None, tokens=None, steps=None)
    made["merge"].add_argument("file", type=Path, help="as `python -m fluxnb contribute` writes it")
    add = made["params"].add_argument
    add(
        "--new", metavar="NAME", help="write params/NAME.yaml for the GPU that is here, such as 4090, or 4090x2 for two"
    )
    add("--match", help="of a GPU that isn't here: words of its name, such as 'RTX 4090'")
    add("--memory", type=float, help="of a GPU that isn't here: its memory in GiB")
    for name in ("report", "render", "reference"):
        add = made[name].add_argument
        add("--model", help="a model of yours instead of the study's: a hub id or a local folder in diffusers' format")
        add("--size", help="of its images in pixels, such as 1024x1024, where its files don't say it")
        add("--tokens", help="of a prompt, T5's, where its files don't say it")
        add("--steps", help="of an image, where its files don't say it")
    add = made["report"].add_argument
    add("--only", action="append", help="a notebook, by name or number; may be repeated")
    add("--force", action="store_true", help="measure all of it again, on any GPU")
    add("--thorough", action="store_true", help="also what takes long: the section `thorough` of the files in params/")
    words = "make the reference's pages anew from its rows, on any machine; measures nothing"
    add("--replay", action="store_true", help=words)
    add("--launch", default="here", help="here: a notebook per free GPU of this machine; slurm: as Slurm's jobs")
    add = made["rows"].add_argument
    add("id", nargs="?", help="of a row, or its beginning")
    add("--notebook", help="list the rows of a notebook, by name or number")
    add("--gpu", help="list the rows of a configuration")
    add("--technique", help="list the rows whose technique, family or stack has this in its name")
    words = "list every line of the documents with the rows that answer it, or the reason"
    add("--documents", action="store_true", help=words)
    made["recipe"].add_argument("--goal", default="near-lossless", help="such as lossless, balanced")
    words = "that it is for: a hub id, a local folder, or one of those with random weights"
    made["recipe"].add_argument("--model", help=words)
    made["recipe"].add_argument("--schnell", action="store_true", help="for a model of few steps without guidance")
    made["recipe"].add_argument("--diffusers", action="store_true", help="without fluxnb, as far as diffusers has it")
    made["export"].add_argument("name", help="embedded, or embedded-schnell: four steps, no guidance")
    made["export"].add_argument("folder", type=Path, help="where it goes: a new or an empty folder")
    made["analysis"].add_argument("prices", nargs="*", help="what a GPU hour costs, such as h200=3.5")
    for name in ("fit-teacache", "plan"):
        made[name].add_argument("--model", default="embedded", help="a model by name")
        made[name].add_argument("--steps", type=int, help="denoising steps, 2 to 200; the model's own by default")
    made["plan"].add_argument("--computed", type=int, nargs="+", help="how many of them are computed: a plan for each")
    words = "prompts by which BudCache's masks are searched, too, to compare with: each takes hundreds of images"
    made["plan"].add_argument("--annealing", type=int, choices=range(25), default=0, metavar="N", help=words)
    made["plan"].add_argument("--to", type=Path, help="the file that the plans go to; beside the weights by default")
    return parser


def _unforeseen(error: Exception) -> str:
    """A sentence on what nothing had foreseen, and the file that has all of it."""
    if lacks_memory(error):
        said, advice = "there is too little memory", "free some, or choose a smaller configuration"
    elif isinstance(error, OSError) and error.strerror:
        said = f"{error.filename or 'a file'}: {error.strerror}"
        advice = "make room and writable what isn't; what was finished is kept, and the same command goes on"
    else:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        said, advice = f"{type(error).__name__}: {first[:200]}", "that shouldn't happen; please report it"
    where = _log("".join(traceback.format_exception(error)))
    return f"{said}: {advice}{f' (all of it is in {where})' if where else ''}."


def _log(text: str) -> Path | None:
    """Writes an error's traceback into build/, or where temporary files go; gives the file, None where neither can."""
    for find in (lambda: _root() / "build", lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, UserError):
            (folder := find()).mkdir(exist_ok=True)
            path = folder / "fluxnb-error.log"
            path.write_text(scrub.scrub(text), encoding="utf-8", errors="backslashreplace")
            return path
    return None


@scrub.terminal()
@leftovers.interrupts()
def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a notebook failed; 2: something the user can put right, said in one sentence."""
    from fluxnb.report import preflight

    for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII only gets the rest spelled out
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"fluxnb: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read what is printed has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001
        lacking = preflight.lacking() if isinstance(error, ModuleNotFoundError) else None
        print(f"fluxnb: {f'{lacking}.' if lacking else _unforeseen(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        by = f" by {number.name}" if error.args else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"fluxnb: interrupted{by}; what was finished is kept, and the same command goes on", file=sys.stderr)
        return 128 + number


if __name__ == "__main__":
    sys.excepthook = scrub.excepthook
    raise SystemExit(main())
