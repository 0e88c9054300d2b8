"""The command line: the group of all commands. Errors that offramp raises on purpose end as one message."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from offramp.command_line.answering import bench, run
from offramp.command_line.generating import generate, score
from offramp.command_line.looking import doctor, inspect, report, verify
from offramp.command_line.making import build_engine, export
from offramp.command_line.placing import place
from offramp.command_line.sweeping import sweep
from offramp.command_line.tracing import diagnose, trace
from offramp.command_line.training import train
from offramp.command_line.tuning import calibrate
from offramp.command_line.watching import monitor
from offramp.errors import BuildError, DataError, InputError, OfframpError, OptionError

_USAGE_ERRORS = (OptionError, InputError, DataError)
_CANCELLED = 130  # what a shell expects after Ctrl-C


class _Group(click.Group):
    """Turns offramp's errors into a message and an exit code: 2 for the caller's mistakes, 1 for the rest."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OfframpError as exc:
            cancelled = isinstance(exc, BuildError) and "cancelled" in str(exc)
            _fail(exc, _CANCELLED if cancelled else 2 if isinstance(exc, _USAGE_ERRORS) else 1)


def _fail(exc: OfframpError, code: int) -> NoReturn:
    click.echo(f"error: {exc}", err=True)
    raise click.exceptions.Exit(code) from exc


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="offramp")
def main() -> None:
    """Put early-exit neural networks into production.

    \b
    offramp train -o checkpoint                 train a classifier with exits
    offramp export checkpoint -o bundle         cut it at the exits, lower to FP16, verify
    offramp build-engine bundle                 one TensorRT engine per segment
    offramp trace bundle                        what every exit says, on the real engines
    offramp place bundle -o placed              keep the exits that pay
    offramp calibrate bundle                    temperatures and thresholds
    offramp report bundle -o report.html        what it does and what may be promised, as a page
    offramp run bundle < texts.txt              answer, each row at the first sure exit
    """


_COMMANDS = (
    train,
    sweep,
    export,
    build_engine,
    trace,
    diagnose,
    place,
    calibrate,
    run,
    generate,
    score,
    bench,
    monitor,
    inspect,
    verify,
    report,
    doctor,
)
for _command in _COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    sys.exit(main())
