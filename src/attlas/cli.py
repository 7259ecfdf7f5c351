"""The command line: `attlas list`, `show`, `compare`, `train` and the others of `COMMANDS`.

A command's module is imported when the command is asked for, so that `attlas list` waits for neither
torch nor Transformers. What a user can mend ends in one sentence on standard error and exit code 2,
never in a traceback.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attlas.errors import UserError

#: Name of each command -> (its module, its function there).
COMMANDS = {
    "list": ("attlas.catalog.command", "list_papers"),
    "show": ("attlas.catalog.command", "show"),
    "verify": ("attlas.contract.command", "verify"),
    "compare": ("attlas.compare.command", "compare"),
    "calibrate": ("attlas.calibration.command", "calibrate_command"),
    "fetch": ("attlas.models.fetch.command", "fetch_command"),
    "adapt": ("attlas.adapting.command", "adapt"),
    "train": ("attlas.train.command", "train"),
    "run": ("attlas.running.command", "run_command"),
    "bench": ("attlas.bench.command", "bench"),
    "roofline": ("attlas.compare.roofline", "roofline"),
    "study": ("attlas.study.command", "study"),
    "inspect": ("attlas.inspect.command", "inspect_command"),
}


#: How help is asked for, of every command.
HELP = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name]
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name, context_settings=HELP)(getattr(import_module(module), function))
        return typer.main.get_command(alone)


app = typer.Typer(
    name="attlas",
    cls=_Commands,
    help="An atlas of attention: build with it, attach it, compare it.",
    no_args_is_help=True,
    context_settings=HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool | None) -> None:
    if asked:
        print(f"attlas {metadata.version('attlas')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Tell it and stop."),
    ] = None,
) -> None:
    """An atlas of attention: build with it, attach it, compare it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the entry point of `attlas` and of `python -m attlas`."""
    try:
        app(arguments)
    except UserError as error:
        print(f"attlas: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("attlas: interrupted; finished results are kept", file=sys.stderr)
        raise SystemExit(130) from None
