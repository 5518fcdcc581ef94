"""Every example in README.md and docs/ is run, page by page, each in a fresh directory with a fresh store.

- ```` ```python NAME ```` (or any language) writes the file NAME; ```` ```python ```` alone is run.
- ```` ```console ````: lines after ``$ `` are commands, the others the output expected of the command above (standard output; ``...`` stands
  for anything). No lines: any output. ``# exit code N`` at the end of a command says what it ends with. A last ``&`` leaves it running;
  it is ready when it has printed something.
- ```` ```text ```` and ```` ```toml ```` are only read.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import blixard
from blixard.config import AppConfig
from blixard.domain import limits
from blixard.domain.payload import Encoding
from blixard.sdk.options import OptionArguments

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^\$ (?P<command>.*?)(?:  # exit code (?P<code>\d+)|  # .*)?$")
LANGUAGES = {"console", "python", "text", "toml", ""}
DEADLINE = 90.0


@dataclasses.dataclass(frozen=True)
class Example:
    command: str
    exit_code: int
    expected: str


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return language, file name and body of every fenced block."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        language, _, name = match["info"].strip().partition(" ")
        found.append((language, name, match["body"]))
    return found


def examples(body: str) -> Iterator[Example]:
    """Yield the commands of a console block. What a here-document holds belongs to its command."""
    parts = re.split(r"^(?=\$ )", body, flags=re.MULTILINE)
    for part in filter(None, parts):
        first, _, rest = part.partition("\n")
        match = COMMAND.match(first)
        assert match, f"a console block begins with '$ ': {first!r}"
        command = match["command"]
        if here := re.search(r"<<'?(\w+)'?", command):
            text, end, rest = rest.partition(f"{here[1]}\n")
            command = f"{command}\n{text}{end}"
        yield Example(command, int(match["code"] or 0), rest)


def matches(expected: str, output: str) -> bool:
    pattern = ".*".join(re.escape(piece) for piece in expected.strip().split("..."))
    return re.fullmatch(pattern, output.strip(), re.DOTALL) is not None


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Shell:
    """Runs commands one after the other; variables and directory carry over, what runs in the background ends with it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.directory = directory / "work"
        self.directory.mkdir()
        self._state = directory / "state"
        self._background: list[subprocess.Popen[bytes]] = []
        inherited = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        self._environment = inherited | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "BLIXARD_STORAGE__DATA_DIR": str(directory / "data"),
            "BLIXARD_SERVER__PORT": self.port,
        }

    def run(self, example: Example) -> None:
        command = example.command.replace("3020", self.port)
        if command.startswith("pip install "):
            return  # it is installed: this test runs in its environment
        if command.endswith(" &"):
            self._start(command.removesuffix(" &"))
            return
        done = self._run(command)
        report = f"$ {command}\n{done.stdout}\n{done.stderr}\n{self._background_log()}"
        assert done.returncode == example.exit_code, f"exit code {done.returncode}\n{report}"
        expected = example.expected.replace("3020", self.port)
        assert not expected.strip() or matches(expected, done.stdout), f"{report}\nexpected:\n{expected}"

    def _run(self, command: str) -> subprocess.CompletedProcess[str]:
        keep = f'status=$?; {{ env -0; }} > {shlex.quote(str(self._state))}; exit "$status"'
        done = subprocess.run(
            ["bash", "-c", f"{command}\n{keep}"],
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        pairs = (entry.partition("=") for entry in self._state.read_text().split("\0") if entry)
        self._environment = {name: value for name, _, value in pairs}
        return done

    def _start(self, command: str) -> None:
        log = self.directory.parent / f"background-{len(self._background)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._background.append(process)
        end = time.monotonic() + DEADLINE
        while log.stat().st_size == 0:
            assert process.poll() is None, f"{command} ended without a word"
            assert time.monotonic() < end, f"{command} says nothing"
            time.sleep(0.05)

    def _background_log(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.directory.parent.glob("background-*.log")))

    def close(self) -> None:
        for process in reversed(self._background):
            process.send_signal(signal.SIGTERM)
        codes = []
        for process in reversed(self._background):
            try:
                codes.append(process.wait(DEADLINE))
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        assert not any(codes), f"{codes}\n{self._background_log()}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    try:
        for language, name, body in blocks(page):
            if name:
                (shell.directory / name).write_text(body)
            elif language == "console":
                for example in examples(body):
                    shell.run(example)
            elif language == "python":
                (shell.directory / "example.py").write_text(body)
                shell.run(Example("python example.py", 0, ""))
    finally:
        shell.close()


def test_every_kind_of_block_is_known() -> None:
    """A misspelt language would be an example that nobody runs."""
    assert {language for page in PAGES for language, _, _ in blocks(page)} <= LANGUAGES


def test_every_toml_example_loads(tmp_path: Path) -> None:
    bodies = [body for page in PAGES for language, name, body in blocks(page) if language == "toml" and not name]
    assert bodies
    for body in bodies:
        (tmp_path / "config.toml").write_text(body)
        AppConfig.load_with_layers(environment={}, directory=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(page.read_text())]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_limit_is_documented_with_its_value() -> None:
    page = (ROOT / "docs/reference/limits.md").read_text()
    wanted = {name: value for name, value in vars(limits).items() if name.startswith(("MAX_", "DEFAULT_"))}
    assert [name for name, value in wanted.items() if f"| `{name}` | {value:,} |" not in page] == []


def test_every_check_of_a_promise_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "PROMISES.md").read_text())
    assert named
    for path, function in named:
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{path}::{function}"


def test_the_command_line_reference_is_up_to_date() -> None:
    program = [sys.executable, str(ROOT / "scripts/cli-reference")]
    text = subprocess.run(program, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout
    assert (ROOT / "docs/reference/cli.md").read_text() == text, "run `make reference`"


def test_the_python_reference_names_everything() -> None:
    page = (ROOT / "docs/reference/sdk.md").read_text()
    members = [name for cls in (blixard.App, blixard.JobFunction, blixard.JobHandle) for name in vars(cls)]
    wanted = {*blixard.__all__, *get_type_hints(OptionArguments), *members, *Encoding}
    # Of the app, for its functions; of a function and a handle, for what waits for several.
    internal = {"bundler", "upload", "upload_file", "forget_uploads", "using", "template", "note_end"}
    assert [name for name in sorted(wanted - internal) if name[0] != "_" and not re.search(rf"\b{name}\b", page)] == []


def test_every_option_of_the_python_reference_has_its_default() -> None:
    page = (ROOT / "docs/reference/sdk.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ", page, re.MULTILINE))
    assert rows == set(get_type_hints(OptionArguments))
