"""Make the project's virtual environment from requirements.lock, or re-make the lock.

    python3 -I fluxnb/_setup.py          make .venv, or bring it up to date  (what `make report` calls)
    python  -I fluxnb/_setup.py lock     re-make requirements.lock           (what `make lock` calls)

Runs before anything is installed: standard library only, and syntax that an old Python can read, so that it
can say that it is too old. pip installs uv, and uv the rest, because recent pip refuses para-attn's metadata.
uv doesn't read pip's configuration, so the package locations configured for pip are handed to it here.
"""

import ast
import contextlib
import os
import re
import subprocess
import sys
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
LOCK = "requirements.lock"
# Written last, removed first: an environment without it is never taken for a finished one.
STAMP = ".ready"
# CUDA builds of torch name their own libraries, other builds need none, so the lock leaves them to torch.
TORCH_BRINGS = re.compile(r"^(nvidia-(?!ml-py\b)|cuda-|triton\b|pytorch-triton).*\n(    .*\n)+", re.MULTILINE)
# Every build of torch (for CPUs, for each CUDA) has files of its own, and most come from an index of their own.
TORCH_HASHES = re.compile(r"^(torch==\S+) \\\n(    --hash=.*\n)+", re.MULTILINE)
LOCK_HEADER = """\
# Every package of the environment, for Python 3.11 and newer on Linux and macOS. Re-made by `make lock`.
# Install with: uv pip install -r requirements.lock
# torch brings its own CUDA libraries where its build needs them, so none are listed, and is pinned without hashes:
# every build of it has files of its own. Of all others no file is installed whose hash isn't here.
"""


class SetupError(Exception):
    """What went wrong and what to do, in one sentence."""


def check_python():
    """Refuse a Python that is too old, or that cannot make a virtual environment."""
    found = "%d.%d.%d" % sys.version_info[:3]
    if sys.version_info < OLDEST:
        raise SetupError(
            "Python %s (%s) is too old: Python %d.%d or newer is needed; name one with "
            "make BASE_PYTHON=/path/to/python3" % ((found, sys.executable) + OLDEST)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            "Python %s (%s) cannot make virtual environments: install its venv module (Debian and Ubuntu: "
            "apt install python3-venv), or name another with make BASE_PYTHON=/path/to/python3"
            % (found, sys.executable)
        ) from None


def run(command, env, capture=False):
    """Run a command in the project's folder; returns its output where captured."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, check=True, universal_newlines=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if capture else None,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        shown = " ".join(os.path.relpath(w, ROOT) if w.startswith(ROOT) else w for w in command)
        raise SetupError(
            "`%s` failed with status %d: its own message is above; put that right and run make again"
            % (shown, error.returncode)
        ) from None
    return done.stdout


def clean_environment():
    """The process's environment without what would lead pip or uv to another Python or another place."""
    astray = {"PYTHONPATH", "PYTHONHOME", "UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_PROJECT", "UV_WORKING_DIR"}
    return dict({k: v for k, v in os.environ.items() if k not in astray}, PIP_USER="0")


def pip_settings(listing):
    """The settings in a `pip config list`, ranked as pip does: [global] < [install] < PIP_… variables."""
    settings = {}
    found = [re.match(r"(global|install|:env:)\.([\w-]+)=(.*)", line) for line in listing.splitlines()]
    for section in ("global", "install", ":env:"):
        for match in found:
            value = str(ast.literal_eval(match.group(3))) if match else ""
            if value and match.group(1) == section:  # pip passes over empty values too
                settings[match.group(2)] = value
    return settings


def present(location):
    """Whether a package location is remote or exists here: pip passes over a missing folder, uv stops."""
    parts = urlsplit(location)
    if parts.scheme and parts.scheme != "file":
        return True
    path = url2pathname(parts.path) if parts.scheme else os.path.expanduser(location)
    return os.path.exists(os.path.join(ROOT, path))


def uv_settings(settings, env):
    """uv's environment variables that mean the same as pip's settings; those the user has set for uv stay.

    The values may hold credentials, so they travel in the environment: never on a command line, which other
    users of the machine can read, and never in a message.
    """

    def places(name, separator):
        listed = [place for place in settings.get(name, "").split() if present(place)]
        listed = [os.path.expanduser(place) if place.startswith("~") else place for place in listed]
        return separator.join(listed)

    wanted = {
        "UV_DEFAULT_INDEX": places("index-url", " "),
        "UV_INDEX": places("extra-index-url", " "),
        "UV_FIND_LINKS": places("find-links", ","),
        "UV_INSECURE_HOST": " ".join(settings.get("trusted-host", "").split()),
        "UV_HTTP_TIMEOUT": settings.get("timeout") or settings.get("default-timeout", ""),
        "SSL_CLIENT_CERT": settings.get("client-cert", ""),
        "HTTP_PROXY": settings.get("proxy", ""),
        "HTTPS_PROXY": settings.get("proxy", ""),
    }
    cert = settings.get("cert", "")
    wanted["SSL_CERT_DIR" if os.path.isdir(cert) else "SSL_CERT_FILE"] = cert if os.path.exists(cert) else ""
    if wanted["UV_INDEX"]:
        # uv's default would stop at the first location that knows a name, in whatever version. With this the first
        # that has the very version answers, and no later one in its place; what it gives has to have the lock's hash.
        wanted["UV_INDEX_STRATEGY"] = "unsafe-first-match"
    older_names = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
    taken = {name for name in wanted if name in env or name.lower() in env or older_names.get(name) in env}
    return {name: value for name, value in wanted.items() if value and name not in taken}


def locked(name):
    """A package's own lines of the lock: its version, and the hashes of its files."""
    with open(os.path.join(ROOT, LOCK), encoding="utf-8") as lock:
        match = re.search(r"^%s==.*\n(    --hash=.*\n)*" % re.escape(name), lock.read(), re.MULTILINE)
    if not match:
        raise SetupError("%s pins no %s: restore it from git" % (LOCK, name))
    return match.group(0)


def pinned(name):
    """The version that the lock pins a package to."""
    return re.match(r"[\w-]+==([^\s;]+)", locked(name)).group(1)


@contextlib.contextmanager
def one_at_a_time():
    """Hold a lock on the project's folder, so that two makes don't build one environment at once."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems know no locks
        yield
    finally:
        os.close(handle)


def is_current(folder):
    """Whether the environment is finished and no older than what it is made from."""
    stamp = os.path.join(folder, STAMP)
    sources = [os.path.join(ROOT, name) for name in (LOCK, "pyproject.toml", "fluxnb/_setup.py")]
    if not (os.path.exists(stamp) and os.path.exists(os.path.join(folder, "bin", "python"))):
        return False
    return all(os.path.getmtime(stamp) >= os.path.getmtime(source) for source in sources)


def make_environment(folder):
    """Make the virtual environment, or bring it up to date with the lock.

    An environment whose last set-up was interrupted has no stamp and is made afresh; uv keeps what it has
    downloaded, so nothing is fetched twice.
    """
    stamp, python = os.path.join(folder, STAMP), os.path.join(folder, "bin", "python")
    env = clean_environment()
    shown = os.path.relpath(folder, ROOT)
    if os.path.exists(stamp) and os.path.exists(python):
        print("fluxnb: bringing the environment in %s up to date" % shown, flush=True)
        os.remove(stamp)
    else:
        made = (shown,) + tuple(sys.version_info[:3])
        print("fluxnb: making the environment in %s (Python %d.%d.%d); minutes, once" % made, flush=True)
        run([sys.executable, "-I", "-m", "venv", "--clear", folder], env)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    wanted = os.path.join(folder, "uv.txt")
    with open(wanted, "w", encoding="utf-8") as file:
        file.write(locked("uv"))
    run(pip + ["install", "--quiet", "-r", wanted], env)
    settings = pip_settings(run(pip + ["config", "list"], env, capture=True))
    env.update(uv_settings(settings, env))
    install = [python, "-m", "uv", "pip", "install", "--python", python, "--compile-bytecode"]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        install.append("--no-index")
    run(install + ["-r", LOCK, "-e", "."], env)
    write(stamp, "made from %s\n" % LOCK)


def clean_notebooks(python):
    """Have git look past what running a notebook leaves in it, in this clone: a notebook run by hand is no change.

    .gitattributes names the filter, and this says what it is. Nothing is done outside a clone or without git.
    """
    if not os.path.exists(os.path.join(ROOT, ".git")):
        return
    local = os.path.join(ROOT, ".venv", "bin", "python")
    runs = ".venv/bin/python" if os.path.abspath(python) == local else "'%s'" % python.replace("'", "'\\''")
    for key, value in (("clean", runs + " -m fluxnb.report.saving"), ("smudge", "cat")):
        command = ["git", "-C", ROOT, "config", "--local", "filter.fluxnb.%s" % key, value]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            return  # no git: nothing is there to be changed


def make_lock(upgrade):
    """Re-make requirements.lock, and set the versions in environment.yml to it.

    Without `upgrade`, versions that still fit stay. Only the default index is asked: the lock must not
    depend on what else happens to be configured on one machine.
    """
    env = clean_environment()
    settings = pip_settings(run([sys.executable, "-m", "pip", "config", "list"], env, capture=True))
    only = ("index-url", "cert", "client-cert", "proxy", "trusted-host", "timeout", "default-timeout")
    env.update(uv_settings({name: settings[name] for name in only if name in settings}, env))
    for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
        env.pop(name, None)
    lock = os.path.join(ROOT, LOCK)
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--universal",
               "--python-version", "%d.%d" % OLDEST, "--fork-strategy", "fewest", "--no-header",
               "--annotation-style", "line", "--generate-hashes", "--quiet", "--output-file", LOCK]  # fmt: skip
    run(command + (["--upgrade"] if upgrade else []), env, capture=True)
    with open(lock, encoding="utf-8") as file:
        text = "".join(line for line in file if not line.startswith("#"))
    write(lock, LOCK_HEADER + TORCH_HASHES.sub(r"\1\n", TORCH_BRINGS.sub("", text)))

    path = os.path.join(ROOT, "environment.yml")
    with open(path, encoding="utf-8") as file:
        text = re.sub(r"\b([a-z0-9-]+)==[\w.]+", lambda m: "%s==%s" % (m[1], pinned(m[1])), file.read())
    write(path, text)


def write(path, text):
    """Writes a file beside the old one, which it then takes the place of: whoever is killed here leaves one of both."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def main(arguments):
    """Makes or updates .venv, or the lock with `lock`; 0 when done, else a sentence and 2."""
    try:
        check_python()
        if arguments[:1] == ["lock"]:
            make_lock(upgrade="--upgrade" in arguments)
        else:
            folder = os.path.join(ROOT, ".venv")
            with one_at_a_time():
                if not is_current(folder):
                    make_environment(folder)
            clean_notebooks(os.path.join(folder, "bin", "python"))
    except SetupError as error:
        print("fluxnb: %s." % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fluxnb: set-up was interrupted; the next make starts it again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
