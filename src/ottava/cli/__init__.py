"""The command line: parses, calls, prints. Exit 0 good, 1 the answer is no, 2 a user's mistake, 3 an internal fault."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from ottava.cli import checkpoints, labels, plans, runs, serving

app = typer.Typer(
    name="ottava",
    help="Train where it is stable, serve where you must: one model, two chip families, the same bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    runs.run,
    runs.report,
    checkpoints.convert,
    checkpoints.verify,
    runs.drill,
    runs.supervise,
    runs.qualify,
    checkpoints.keygen,
    checkpoints.targets,
    checkpoints.students,
    plans.plan,
    plans.dossier,
    plans.forecast,
    plans.pick,
    plans.predict,
    plans.calibrate,
    plans.cost,
    serving.serve,
    checkpoints.parity,
    serving.chat,
    runs.evaluate,
    runs.doctor,
):
    app.command()(command)
app.add_typer(labels.app, name="label")

STOPPED = 130
GO_ON = "stopped; the same command goes on where there is work to go on with"


def main() -> NoReturn:
    """Entry point."""
    _leave(outcome())


def outcome() -> int:
    """Do what the command line says: every outcome becomes one message and an exit code."""
    from ottava.errors import OttavaError, from_os_error

    try:
        code = app(standalone_mode=False) or 0  # click hands back the code of an Exit
        if code == STOPPED:  # typer's own word for Ctrl-C
            _say(GO_ON, STOPPED)
    except OttavaError as error:
        code = _say(error.render(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _say(GO_ON, STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        mended = from_os_error(error, "working")
        code = _say(mended.render(), mended.exit_code)
    except Exception as error:
        code = _unexpected(error)
    return int(code)


def _leave(code: int) -> NoReturn:
    """End the process. Triton, which Transformers imports where it finds it, tells at the end of an interpreter of what
    its own bindings leaked: the user cannot mend that, so the interpreter's end is left out then."""
    if "triton" in sys.modules:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unexpected(error: Exception) -> int:
    if isinstance(error, RuntimeError) and "Failed to load the backend extension" in str(error):
        from ottava.platforms.ascend.setup import broken_plugin

        return _say(broken_plugin(error).render(), 2)
    usage = getattr(error, "format_message", None)  # click's own errors
    if usage is not None:
        return _say(f"error: {usage()}\n  mend:  see ottava --help", 2)
    import traceback

    traceback.print_exc()
    return _say(f"internal fault: {error!r}\n  mend:  this is a defect of ottava; please report the lines above", 3)


def _say(message: str, code: int) -> int:
    sys.stderr.write(message + "\n")
    return code
