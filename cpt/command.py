"""How a command ends: its problems become lines on standard error, and an exit code."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cpt.errors import CptError


def as_command(main: Callable[[], Any]) -> NoReturn:
    """Run `main` as `cpt` runs a command, and exit.

    Problems that cpt knows are said in a line each (exit codes: docs/run_directory.md), on the first process of a
    launch; a traceback is left for what it does not know.
    """
    code = _exit_code(main)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        _part(code)
    sys.exit(code)


def _exit_code(main: Callable[[], Any]) -> int:
    try:
        main()
    except CptError as error:
        for problem in () if error.elsewhere else error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _stopped_at_once()
    except SystemExit as end:
        if end.code == 130:  # what typer makes of a KeyboardInterrupt, without a word
            return _stopped_at_once()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _stopped_at_once() -> int:
    print("error: stopped at once; a run goes on from its newest checkpoint when it is started again", file=sys.stderr)
    return 130


def _part(code: int) -> NoReturn:
    """Leave the other processes of a launch without the interpreter's own end: a thread of gloo may abort that."""
    import torch.distributed as dist

    if code == 0 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
