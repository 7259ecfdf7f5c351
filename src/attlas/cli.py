"""The command line: `attlas list`, `show`, `verify`, `compare`, `calibrate`, `fetch`, `train`,
`roofline`.

What a user can mend ends in one sentence on standard error and exit code 2, never in a traceback.
"""

from __future__ import annotations

import sys

import typer

from attlas.calibration.command import calibrate_command
from attlas.catalog.command import list_papers, show
from attlas.compare.command import compare
from attlas.compare.roofline import roofline
from attlas.contract.command import verify
from attlas.errors import UserError
from attlas.models.fetch.command import fetch_command
from attlas.train.command import train

app = typer.Typer(
    name="attlas",
    help="An atlas of attention: build with it, attach it, compare it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_papers)
app.command()(show)
app.command()(verify)
app.command()(compare)
app.command("calibrate")(calibrate_command)
app.command("fetch")(fetch_command)
app.command()(train)
app.command()(roofline)


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
