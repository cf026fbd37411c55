"""What can go wrong for a user, and the exit code each kind of failure ends the process with."""


class CptError(Exception):
    """A failure a user can act on: one or more sentences, each with its place and the next step.

    The command line prints `problems`, one a line, and exits with `exit_code`.
    """

    exit_code = 2
    elsewhere = False  # a copy of what another process of the run raised, and says

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class ConfigError(CptError):
    """What the user wrote in YAML, on the command line or in Python does not hold together. Exit code 2."""


class DataError(CptError):
    """Rows, columns, files or a tokenizer that cannot be trained or measured on. Exit code 2."""


class RunDirError(CptError):
    """A run directory that belongs to another stream, is in use, or is damaged. Exit code 3."""

    exit_code = 3


class TrainingError(CptError):
    """Training could not go on: a loss that is not a number, a full disk. Exit code 4."""

    exit_code = 4


class Stopped(CptError):
    """SIGTERM arrived: a checkpoint is written and the same command goes on from it. Exit code 75."""

    exit_code = 75


class UserStopped(Stopped):
    """Ctrl-C: as `Stopped`, with the shell's own exit code for it. Exit code 130."""

    exit_code = 130
