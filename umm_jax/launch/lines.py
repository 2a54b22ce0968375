"""Jobs as a line or a script: xpk for GKE, SLURM for clusters of GPUs."""

import shlex

from umm_jax.errors import ConfigError
from umm_jax.launch.job import FINAL, Job
from umm_jax.plan.chips import Topology


def xpk(job: Job, topology: Topology, image: str, *, cluster: str, zone: str, project: str) -> str:
    """The command that creates the workload with xpk."""
    return shlex.join(
        [
            *("xpk", "workload", "create"),
            f"--cluster={cluster}",
            f"--zone={zone}",
            f"--project={project}",
            f"--workload={job.name}",
            f"--tpu-type={topology.accelerator}",
            f"--num-slices={topology.slices}",
            f"--docker-image={image}",
            f"--max-restarts={job.restarts}",
            *(f"--env={key}={value}" for key, value in job.env.items()),
            f"--command={job.line}",
        ]
    )


def slurm(
    job: Job,
    *,
    nodes: int,
    gpus: int,
    hours: float,
    partition: str = "",
    image: str = "",
    cells: int = 0,
) -> str:
    """A script for sbatch: one task a GPU.

    Before its time is up the tasks get SIGTERM, save, and leave with 143; the script then puts itself into
    the queue again.

    Args:
        gpus: of each node. hours: of one start. image: of a container (pyxis), or "" for none.
        cells: of a sweep: an array of so many elements, each one task that runs the job's program on its
            cell; 0 is no array.
    """
    if cells and nodes > 1:
        raise ConfigError(f"--nodes={nodes}: a cell of a sweep runs on one; use --nodes=1")
    if hours * 3600 <= job.grace:
        raise ConfigError(f"--hours={hours:g}: shorter than the {job.grace} s that saving may take")
    minutes = max(int(hours * 60), 1)
    head = [
        "#!/bin/sh",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --ntasks-per-node={1 if cells else gpus}",
        f"#SBATCH --gpus-per-node={gpus}",
        f"#SBATCH --time={minutes // 60}:{minutes % 60:02}:00",
        f"#SBATCH --signal=TERM@{job.grace}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        *([f"#SBATCH --array=0-{cells - 1}"] if cells else []),
        f"#SBATCH --output={job.name}-{'%A_%a' if cells else '%j'}.log",
        *([f"#SBATCH --partition={partition}"] if partition else []),
    ]
    run = ["srun", "--kill-on-bad-exit=1", *([f"--container-image={image}"] if image else [])]
    final = "|".join(map(str, sorted(FINAL)))
    return "\n".join(
        [
            *head,
            "",
            *(f"export {key}={shlex.quote(value)}" for key, value in job.env.items()),
            f"{shlex.join(run)} {job.line}" + (' --cell="$SLURM_ARRAY_TASK_ID"' if cells else ""),
            "status=$?",
            'case "$status" in',
            "    0) ;;",
            f'    {final}) echo "ended with status $status: not started again" >&2 ;;',
            f'    *) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ] && '
            'scontrol requeue "$SLURM_JOB_ID" ;;',
            "esac",
            'exit "$status"',
            "",
        ]
    )
