"""No secret is written or printed, wherever it fails and however it is spelled there."""

import base64
import html
import json
import os
import subprocess
import sys
from urllib.parse import quote

import pytest
from test_report import OWN, REPOSITORY, cell, write_notebook

from fluxnb import __main__ as command_line
from fluxnb import scrub
from fluxnb.errors import UserError
from fluxnb.measure import ranks
from fluxnb.report import publish, write_atomic, write_json
from fluxnb.study.results import Results

TOKEN, PASSWORD, STORED = "hf_secretsecretsecret", "a\"b<c>d&e/f g'h\\i", "not.of-the.environment"
# how an error, a page, a notebook or a log may spell it
SPELLED = {
    "plain": str,
    "in an address": lambda secret: f"401 for https://user:{quote(secret, safe='')}@host/x",
    "quoted": lambda secret: quote(secret, safe=""),
    "quoted twice": lambda secret: quote(quote(secret)),
    "JSON": json.dumps,
    "JSON in JSON": lambda secret: json.dumps(json.dumps(secret)),
    "HTML": html.escape,
    "HTML in HTML": lambda secret: html.escape(html.escape(secret)),
    "entities": lambda secret: "".join(f"&#{ord(c)};" for c in secret),
    "hexadecimal entities": lambda secret: "".join(f"&#x{ord(c):x};" for c in secret),
    "percents": lambda secret: "".join(f"%{ord(c):02X}" for c in secret),
    "escapes": lambda secret: "".join(f"\\u{ord(c):04x}" for c in secret),
    "a repr": repr,
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 of a user and it": lambda secret: base64.b64encode(f"me:{secret}".encode()).decode(),
    "base64 of an address with it": lambda secret: base64.urlsafe_b64encode(f"x://{secret}@h".encode()).decode(),
    "bytes": lambda secret: secret.encode().hex(),
    "colours": lambda secret: f"{secret[:3]}\x1b[1;31m{secret[3:6]}\x1b[0m{secret[6:]}",
    "tags": lambda secret: f"<b>{html.escape(secret[:4])}</b><span class='k'>{html.escape(secret[4:])}</span>",
    "attributes": lambda secret: f'<p title="{html.escape(secret[:4])}" data-b="{html.escape(secret[4:])}">',
    "lines": lambda secret: f"{secret[:5]}\n    {secret[5:]}",
}


def lies_in(secret: str, text: str) -> bool:
    """Whether a text holds a secret, spelled in any of these ways."""
    return any(spell(secret) in text for spell in SPELLED.values())


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """A machine with secrets in its environment and in the hub's files."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "token").write_text("hf_of.the.file-1\n")
    (hub / "stored_tokens").write_text(f"[mine]\nhf_token = {STORED}\n")
    monkeypatch.setenv("HF_HOME", str(hub))
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LAB_PASSWORD", PASSWORD)
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:s3cret-of-index@mirror.invalid/simple")
    monkeypatch.setenv("UV_INDEX_URL", "https://0token-of-an-index@mirror.invalid/simple")
    monkeypatch.setenv("GITHUB_PAT", "of-git-0123")
    scrub._of_files.cache_clear()
    yield [TOKEN, PASSWORD, STORED, "hf_of.the.file-1", "s3cret-of-index", "0token-of-an-index", "of-git-0123"]
    scrub._of_files.cache_clear()


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_secret_is_named_instead_of_written(secrets, spelled):
    for secret in secrets:
        clean = scrub.scrub(f"before {SPELLED[spelled](secret)} after")
        assert not lies_in(secret, clean) and clean.startswith("before ") and clean.endswith(" after"), clean


@pytest.mark.parametrize(
    ("said", "clean"),
    [
        ("https://user:swordfish@host/x?a=b", "https://[removed]@host/x?a=b"),
        ("x?url=https%3A%2F%2Fuser%3Aswordfish%40host%2F", "x?url=https%3A%2F%2F[removed]%40host%2F"),
        ("git+https://0123456789abcdef0123@host", "git+https://[removed]@host"),
        ("Authorization: Bearer abc.def-ghi_jkl", "Authorization: Bearer [removed]"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic [removed]'}"),
        ("of hf_abcdefghijklmnopqrst,", "of [token removed],"),
        ("api_org_abcdefghijklmnopqrst", "[token removed]"),
        ("ghp_0123456789abcdefghijKLMNOPQRSTUVWXYZ", "[token removed]"),
        ("github_pat_11ABCDEFG0123456789_abcdefgh", "[token removed]"),
        ("sk-proj-abcdefghij0123456789", "[token removed]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", "[token removed]"),
        ("x?Policy=abc&Signature=AbC~dEf123456&Key-Pair-Id=K", "x?Policy=abc&Signature=[removed]&Key-Pair-Id=K"),
        ("?a=b&amp;X-Amz-Security-Token=0123456789ab", "?a=b&amp;X-Amz-Security-Token=[removed]"),
        ("Set-Cookie: token=abcdefghijk; Path=/", "Set-Cookie: token=[removed]; Path=/"),
        ("{'x-api-key': 'abcdefghijk'}", "{'x-api-key': '[removed]'}"),
    ],
)
def test_what_looks_like_a_secret_is_one(said, clean):
    assert scrub.scrub(said) == clean


@pytest.mark.parametrize(
    "said",
    [
        "http://localhost:8888/a@b",
        "git@github.com:a/b",
        "https://a.org/x?y=1@2",
        "ssh://git@github.com",
        "hf_hub_download",
        "hf_hub_download_of_whatever_it_is",
        "num_tokens=512; token=8; the-task-0123456789-x of sk-learn-some-thing-else",
        "x-axis: latency in seconds",
        "?max_tokens=512&key=threshold-0.12345",
    ],
)
def test_what_is_none_is_left_alone(said, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "said")
    monkeypatch.setenv("FLUXNB_TOKENS", "hf_hub_download")
    assert scrub.scrub(said) == said


def test_files_and_rows_hold_none_and_a_row_is_found_again(secrets, tmp_path):
    write_atomic(tmp_path / "a.html", f"<p>{html.escape(PASSWORD)}</p>")
    write_json(tmp_path / "b.json", {"error": f"{TOKEN} {PASSWORD}"})
    assert json.loads((tmp_path / "b.json").read_text()) == {"error": "[HF_TOKEN] [LAB_PASSWORD]"}
    key = {
        "notebook": "n",
        "technique": "t",
        "gpu": "g",
        "host": "h",
        "versions": "v",
        "weights": "trained",
        "model": f"https://x:{TOKEN}@h/m",
    }
    row = {**key, "family": "f", "status": "oom", "reason": TOKEN, "proof": {"said": [PASSWORD]}}
    row = Results(tmp_path / "r.csv").append(row)
    assert Results(tmp_path / "r.csv").find(key) == row and row.proof == {"said": ["[LAB_PASSWORD]"]}
    assert not any(lies_in(secret, path.read_text()) for path in tmp_path.glob("*.*") for secret in secrets)


def test_the_terminal_shows_none(secrets, monkeypatch, capsys):
    def fails(*_):
        print(f"printed {TOKEN}")
        raise UserError(f"The folder https://user:{TOKEN}@host is not there.")

    monkeypatch.setattr(publish, "site", fails)
    assert command_line.main(["site"]) == 2
    with pytest.raises(SystemExit):
        command_line.main([TOKEN])
    try:
        raise RuntimeError(PASSWORD)
    except RuntimeError as error:
        scrub.excepthook(type(error), error, error.__traceback__)
    shown = "".join(capsys.readouterr())
    assert "printed [HF_TOKEN]" in shown and "RuntimeError: [LAB_PASSWORD]" in shown
    assert not any(lies_in(secret, shown) for secret in secrets)


def test_what_ranks_print_is_logged_without(secrets, tmp_path, monkeypatch):
    def started(folder, world):
        (folder / ranks.PRINTED).write_text(f"401 for {TOKEN}\n")
        return subprocess.Popen(["false"])

    monkeypatch.setattr(ranks, "_start", started)
    with pytest.raises(ranks.RankError):
        list(ranks.run("a:b", 2, log=tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "401 for [HF_TOKEN]\n"


FAILS = """
    import html, json, os, sys, warnings
    from urllib.parse import quote
    from IPython.display import HTML, Markdown, display
    from fluxnb.report import html as show
    from fluxnb.study.results import Results

    secrets = [os.environ["HF_TOKEN"], os.environ["LAB_PASSWORD"]]
    said = " ".join(secrets) + f" https://user:{quote(secrets[1], safe='')}@host/ {json.dumps(secrets)}"
    print(said)
    print(said, file=sys.stderr)
    os.write(2, said.encode())
    warnings.warn(said)
    show.callout(said, "result")
    display(HTML(f"<p title='{html.escape(said)}'>{secrets[0][:7]}<b>{secrets[0][7:]}</b></p>"), Markdown(said))
    with open(os.environ["FLUXNB_PROGRESS"], "a") as file:
        print(json.dumps({"notebook": "01_fails", "done": 1, "found": 0, "total": 2, "label": said}), file=file)
    row = {"notebook": "01_fails", "technique": "t", "gpu": "cpu", "host": "m", "versions": "v", "label": said}
    row |= {"family": "baseline", "weights": "random", "run_id": "r", "status": "error", "reason": said}
    Results("reports/own/single_gpu/cpu/results.csv").append(row)
"""


def test_no_output_of_a_run_whose_every_stage_fails_holds_one(secrets, tmp_path):
    root = tmp_path / "project"
    write_notebook(root, "01_fails", cell(FAILS), cell("raise RuntimeError(said)"))
    write_notebook(root, "02_dies", cell("import os; os.write(1, os.environ['HF_TOKEN'].encode()); os._exit(3)"))
    code = (
        f"import os, sys; sys.path[:0] = [{str(REPOSITORY / 'tests')!r}, {str(REPOSITORY)!r}]\n"
        "from pathlib import Path\nfrom fluxnb import scrub\nfrom test_report import FakeParams, render, run\n"
        "sys.excepthook = scrub.excepthook\n"
        "with scrub.terminal():\n"
        f"    place = Path({str(root)!r})\n"
        "    run(FakeParams(), place, {'error': os.environ['HF_TOKEN']}, stream=sys.stdout)\n"
        "    render(FakeParams(), place)\n"
        "    raise RuntimeError(os.environ['LAB_PASSWORD'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and ": RuntimeError: [HF_TOKEN]" in done.stdout, done.stderr
    files = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
    made = {str(path) for path in files}
    assert {f"{OWN}/results.csv", f"{OWN}/pages.json", f"{OWN}/index.html", f"{OWN}/01_fails.html"} <= made
    assert {"build/cpu/01_fails.failed.ipynb", "build/cpu/02_dies.kernel.log", f"{OWN}/progress.md"} <= made
    held = [str(name) for name, path in files.items() for s in secrets if lies_in(s, path.read_text(errors="replace"))]
    assert not held
    assert not any(lies_in(secret, done.stdout + done.stderr) for secret in secrets)
