"""Every command of docs/findings.md prints what stands below it."""

import contextlib
import io
import re
import shlex

import pytest
from conftest import HERE

from tbq.families import amesianx
from tools import crossread

PAGE = (HERE.parent / "docs" / "findings.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"python -c '\n(.*?)'\n", re.DOTALL)
SECTIONS = {
    title: (commands, printed)
    for title, commands, printed in re.findall(
        r"^## ([^\n]*)\n(?:(?!^## ).)*?```sh\n(.*?)```\n\n```text\n(.*?)```",
        PAGE,
        re.DOTALL | re.MULTILINE,
    )
}


def test_no_command_is_passed_over():
    assert len(SECTIONS) == PAGE.count("```sh\n") == PAGE.count("```text\n") >= 12


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("title", SECTIONS)
def test_commands_print_what_the_page_says(title, monkeypatch):
    commands, printed = SECTIONS[title]
    monkeypatch.chdir(HERE.parent)
    monkeypatch.setattr(amesianx, "sin", amesianx.sin)  # which one command replaces
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        while commands:
            code = PYTHON.match(commands)
            if code:
                exec(compile(code[1], title, "exec"), {})
                commands = commands[code.end() :]
                continue
            line, _, commands = commands.partition("\n")
            words = shlex.split(line)
            assert words[:3] == ["python", "-m", "tools.crossread"], line
            assert crossread.main(words[3:]) == 0
    assert out.getvalue() == printed


def test_formats_that_do_not_exist_are_refused(capsys):
    assert crossread.main(["buun:turbo5"]) == 2
    assert "turbo5" in capsys.readouterr().err
