"""Programs in processes of their own, with as many virtual CPU devices as they ask for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(devices: int = 1) -> dict[str, str]:
    """Variables of a process that finds the package and the tests' helpers, and compiles quickly."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # XLA runs virtual devices in one pool of as many threads as there are devices. A collective blocks
        # its thread until all its devices are there, and a device may wait in several: in a pool that small,
        # devices in different collectives can wait for one another for ever.
        "NPROC": "64",
        # On a busy machine the threads of all devices need more than the 40 seconds a collective is given.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=100 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }


def two_processes(program: str, *arguments: str) -> list[str]:
    """What both processes of a job print, of four devices each: PROGRAM PORT PROCESS *arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(process), *arguments],
            env=environment(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    ended = [process.communicate(timeout=200) for process in running]
    assert not any(process.returncode for process in running), [error[-2000:] for _, error in ended]
    return [out for out, _ in ended]
