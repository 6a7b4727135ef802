"""The ``dnp`` command. Results go to files and stdout, everything else to stderr.

Exit codes: 0 done, 2 bad settings or usage, 3 bundle, 4 backend, 5 export, 6 output, 130 cancelled, 1 anything else.
"""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False  # nothing is imported before ``main`` runs, which answers a Ctrl-C; before that it is a traceback
if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CODES = """\b
Exit codes:
  0    done
  1    an error of any other kind
  2    a setting, prompt or image that cannot be honoured
  3    a bundle that is missing, damaged or too new
  4    a backend that cannot run here, or a package that is not installed
  5    a model that cannot be exported
  6    a place that cannot be written to
  130  cancelled (Ctrl-C, SIGTERM); no picture or bundle is half-written
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    try:
        from dnp.cli.signals import came, ignore, listen

        listen()
        code = _run_on_streams(arguments)
        ignore()
        cancelled = came()
    except BaseException as error:
        from dnp.cli.signals import came, ignore

        ignore()  # a second one changes nothing
        # Extension modules turn a KeyboardInterrupt while they are imported into errors of other kinds.
        cancelled = isinstance(error, KeyboardInterrupt) or came()
        if not cancelled:
            raise
    if cancelled:
        from dnp.cli.streams import complain

        complain("cancelled")
        code = 130
    gc.freeze()  # with torch loaded, a last look for cycles takes tens of seconds, and frees nothing that is needed
    sys.exit(code)


def _run_on_streams(arguments: Sequence[str] | None) -> int:
    """``run``, on streams that may be closed, full or read by nobody any more."""
    from dnp.cli.streams import complain, make_usable, swallow

    make_usable()
    try:
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away
        swallow("stdout")
        return 0
    except OSError as error:
        complain(f"cannot write to stdout: {error.strerror or error}")
        swallow("stdout")
        return 6
    return code


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line as a function: does the work, prints errors, returns the exit code."""
    import click

    from dnp.cli.bundles import doctor, export, inspect
    from dnp.cli.images import caption, dns, explore, generate
    from dnp.cli.plans import build
    from dnp.cli.serve import bench_serve, serve
    from dnp.cli.streams import complain, swallow
    from dnp.engine.errors import DnpError

    @click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(package_name="dnp-engine", prog_name="dnp")
    def dnp() -> None:
        """Diffusion-negative prompting: find the image a model thinks least like the prompt, put it into words,
        and generate with the pair (p, n*)."""

    for command in (generate, dns, explore, caption, export, build, inspect, doctor, serve, bench_serve):
        dnp.add_command(command)
    try:
        returned = dnp.main(arguments, prog_name="dnp", standalone_mode=False)
    except click.ClickException as error:
        try:
            error.show()
        except OSError:
            swallow("stderr")
        return error.exit_code
    except click.Abort:  # click's own name for Ctrl-C
        raise KeyboardInterrupt from None
    except DnpError as error:
        complain(str(error))
        return error.exit_code
    return returned if isinstance(returned, int) else 0
