"""A job as every scheduler needs it: what runs, on what, and which endings are worth another start."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from umm_jax import errors
from umm_jax.errors import ConfigError

# Endings that another start does not mend, see ``errors``; it does all others (preemption, a hang, a lost
# machine). 1 is also an error of ours, and a run that stopped itself.
FINAL = (1, 130, *sorted({kind.exit_status for kind in errors.UserError.__subclasses__()} - {1, 130}))

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Job:
    """A training run, or a cell of a sweep, to be started on a cluster.

    Attributes:
        name: lower case, digits and dashes, at most 40 characters: others make longer names of it.
        config, workdir: as the machines see them; workdir is on storage that all of them share.
        overrides: ``--config.a.b=VALUE``, whole.
        env: variables of the processes.
        restarts: how often the scheduler may start it again.
        grace: seconds between SIGTERM and SIGKILL, in which a checkpoint is written.
        program: what runs in place of training, words after ``umm``: one process, on one machine.
    """

    name: str
    config: str
    workdir: str
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 100
    grace: int = 300
    program: tuple[str, ...] = ()

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"--name={self.name!r}: lower case, digits and dashes, a letter first, at most 40 characters"
            )
        if "://" in self.workdir:
            raise ConfigError(
                f"--workdir={self.workdir}: a run is written to a folder; mount the bucket on every machine "
                "(gcsfuse) and give the path it is mounted at"
            )
        for key in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", key):
                raise ConfigError(f"--env: {key!r} is no name of a variable")

    @property
    def command(self) -> list[str]:
        """What every process of the job runs."""
        if self.program:
            return ["umm", *self.program]
        asked = [f"--config={self.config}", f"--workdir={self.workdir}", "--coordinator=auto"]
        return ["umm", "train", *asked, *self.overrides]

    @property
    def line(self) -> str:
        """The command for a shell."""
        return shlex.join(self.command)


def of_sweep(job: Job, plan: str) -> Job:
    """The job that runs a sweep, in its workdir; with ``--cell=K`` added, one of its cells."""
    return replace(job, program=("sweep", plan, f"--out={job.workdir}"))


def of_cells(sweep: Job, cells: int) -> list[Job]:
    """One job for each cell of a sweep."""
    return [
        replace(sweep, name=f"{sweep.name}-{k}", program=(*sweep.program, f"--cell={k}"))
        for k in range(cells)
    ]
