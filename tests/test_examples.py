"""The examples say what the command line takes, and use what is there."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from vcompress.cli import cli

EXAMPLES = Path(__file__).parents[1] / "examples"
WORKFLOW: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())


def commands() -> list[list[str]]:
    """Every call of vcompress in the workflow, without what the shell takes away."""
    found = []
    for step in WORKFLOW["jobs"]["bench"]["steps"]:
        for line in step.get("run", "").splitlines():
            if line.strip().startswith("vcompress "):
                words = shlex.split(re.split(r"\|\||>>", line)[0])
                found.append(words[1:])
    return found


def test_the_workflow_is_one() -> None:
    # YAML 1.1 reads the key `on` as true.
    assert WORKFLOW[True] == "pull_request"
    steps = WORKFLOW["jobs"]["bench"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert [words[0] for words in commands()] == ["quantize", "quantize", "bench", "compare"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_takes_what_the_workflow_says(words: list[str]) -> None:
    command = cli.commands[words[0]]
    with click.Context(command) as context:
        command.parse_args(context, words[1:])
    assert context.params


PROGRAMS = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program_uses_what_is_there(name: str) -> None:
    tree = ast.parse(PROGRAMS[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vcompress"):
            module = import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
    for line in (ast.get_docstring(tree) or "").splitlines():
        if line.strip().startswith("vcompress "):
            words = shlex.split(line)[1:]
            with click.Context(cli.commands[words[0]]) as context:
                cli.commands[words[0]].parse_args(context, words[1:])
