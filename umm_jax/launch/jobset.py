"""A JobSet for GKE: one child job a slice, one pod a host.

The names of node labels and resources are those of GKE's documentation of TPUs; the fields are held against
the schema of JobSet's own resource definition in the tests. A preempted or hung pod fails its job, and with
it the set starts again from the newest checkpoint; what another start cannot mend fails the set at once.
"""

from typing import Any

from umm_jax.launch.job import FINAL, Job
from umm_jax.plan.chips import Topology

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}

HOST = 4  # chips of a host of a slice with several hosts


def manifest(
    job: Job, topology: Topology, image: str, *, namespace: str = "default", spot: bool = False
) -> dict[str, Any]:
    """The JobSet as YAML or JSON would hold it.

    Args:
        image: with umm_jax in it, see the Dockerfile. spot: on spot nodes, which they have to be labelled as.
    """
    slice_chips = topology.chips // topology.slices
    chips = min(HOST, slice_chips)
    hosts = slice_chips // chips
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.chip.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
        **({"cloud.google.com/gke-spot": "true"} if spot else {}),
    }
    container = {
        "name": "train",
        "image": image,
        # No shell between: SIGTERM must reach the process that saves.
        "command": job.command,
        "env": [{"name": key, "value": value} for key, value in job.env.items()],
        # What the slices' coordinator and the job's coordinator listen on.
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        # Data workers hand batches over in shared memory, of which a pod has 64 MB unless it asks.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": nodes,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    child = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": sorted(FINAL)},
                }
            ]
        },
        "template": {"spec": pod},
    }
    final = {
        "name": "nothingtomend",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": namespace,
            # One child job has a node pool, that is a slice, for itself.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [final]},
            "replicatedJobs": [
                {"name": "slice", "replicas": topology.slices, "template": {"spec": child}},
            ],
        },
    }
