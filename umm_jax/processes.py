"""A job of several processes: how they find each other."""

import jax

from umm_jax.errors import ConfigError, DeviceError

# Seconds that a process waits for the others.
PATIENCE = 300


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins this process to its job. Call it before anything asks for devices.

    Args:
        coordinator: HOST:PORT of the job's first process; "auto" asks the cluster (Cloud TPU, GKE, SLURM,
            Open MPI) for all three; None is a job of one process.
        count, index: of processes, and which of them this is.

    Raises:
        ConfigError: one without the others.
        DeviceError: the others do not come, or there is no cluster to ask.
    """
    if coordinator == "auto" and count is None and index is None:
        given = {}
    elif coordinator is None and count is None and index is None:
        return
    elif coordinator in (None, "auto") or count is None or index is None or ":" not in coordinator:
        raise ConfigError(
            "a job of several processes needs --coordinator=HOST:PORT, --processes=N and --process=0 to N-1, "
            "or --coordinator=auto alone, which asks the cluster"
        )
    elif index >= count:
        raise ConfigError(f"--process={index}: there are {count}, numbered from 0")
    else:
        given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**given, initialization_timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DeviceError(f"the job's processes did not find each other ({first})") from error
