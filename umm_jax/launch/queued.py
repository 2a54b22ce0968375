"""Cloud TPU's queued resources: asks for slices, waits for them, and asks again when they are taken away.

The machines need nobody once they are there: a script given to them starts the run on every worker at each
boot, starts it again after a hang, and deletes the resource when the run has ended, so that nobody pays for
idle chips. Who watches may therefore die: what was asked for is written to a file before it is asked, and the
same command picks it up there.

The client is Google's own, of the extra ``launch``.
"""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umm_jax.data.files import write_atomic
from umm_jax.errors import ConfigError, DeviceError, Interrupted
from umm_jax.launch.job import FINAL, Job
from umm_jax.plan.chips import Topology

# Software of the machines, by chip: what Cloud TPU's documentation recommends for JAX.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

POLL = 30.0  # seconds between two looks


@dataclass(frozen=True)
class Place:
    """Where and how the slices are asked for.

    Attributes:
        spot: slices that may be taken away. reservation: name of one, or "".
        image: container with umm_jax in it. runtime: software of the machines, RUNTIMES' unless given.
        hours: after which a request that waits is given up; None waits for ever.
    """

    project: str
    zone: str
    image: str
    spot: bool = False
    reservation: str = ""
    runtime: str = ""
    service_account: str = ""
    hours: float | None = None

    def __post_init__(self):
        if self.spot and self.reservation:
            raise ConfigError("--spot and --reservation exclude each other")

    @property
    def parent(self) -> str:
        return f"projects/{self.project}/locations/{self.zone}"

    def name(self, resource: str) -> str:
        """Of a queued resource, as the API calls it."""
        return f"{self.parent}/queuedResources/{resource}"


def startup_script(job: Job, place: Place, resource: str) -> str:
    """What every worker runs at boot, as root."""
    name = place.name(resource)
    env = " ".join(f"-e {shlex.quote(f'{key}={value}')}" for key, value in job.env.items())
    docker = (
        f"docker run --rm --name umm --privileged --net=host --ipc=host --stop-timeout={job.grace} "
        f"-v /mnt:/mnt {env + ' ' if env else ''}{shlex.quote(place.image)} {job.line}"
    )
    final = "|".join(map(str, (0, *sorted(FINAL))))
    token = "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/token"
    read_token = "import json, sys; print(json.load(sys.stdin)['access_token'])"
    return f"""#!/bin/sh
# Starts the run on this worker, and again after endings that another start mends.
left={job.restarts}
while :; do
    {docker}
    status=$?
    case "$status" in {final}) break ;; esac
    [ "$left" -gt 0 ] || break
    left=$((left - 1))
    sleep 10
done
mkdir -p {shlex.quote(job.workdir)}/launch
echo "$status" > {shlex.quote(job.workdir)}/launch/{resource}-$(hostname).status
# The others end now too. Then nobody needs these machines.
sleep 60
token=$(curl -s -H 'Metadata-Flavor: Google' {token} | python3 -c {shlex.quote(read_token)})
curl -s -X DELETE -H "Authorization: Bearer $token" 'https://tpu.googleapis.com/v2/{name}?force=true'
"""


def request(job: Job, topology: Topology, place: Place, resource: str) -> dict[str, Any]:
    """The body of CreateQueuedResource, as JSON would hold it."""
    node: dict[str, Any] = {
        "accelerator_type": topology.accelerator,
        "runtime_version": place.runtime or RUNTIMES[topology.chip.name],
        "network_config": {"enable_external_ips": True},
        "metadata": {"startup-script": startup_script(job, place, resource)},
        "labels": {"umm-job": job.name},
    }
    if place.service_account:
        node["service_account"] = {"email": place.service_account, "scope": ["cloud-platform"]}
    spec: dict[str, Any] = {"parent": place.parent, "node": node}
    if topology.slices > 1:
        spec["multislice_params"] = {"node_count": topology.slices, "node_id_prefix": resource}
    else:
        spec["node_id"] = resource
    asked: dict[str, Any] = {"tpu": {"node_spec": [spec]}}
    if place.spot:
        asked["spot"] = {}
    elif place.reservation:
        asked["guaranteed"] = {}
        asked["reservation_name"] = f"{place.parent}/reservations/{place.reservation}"
    if place.hours is not None:
        asked["queueing_policy"] = {"valid_until_duration": f"{int(place.hours * 3600)}s"}
    return {"parent": place.parent, "queued_resource_id": resource, "queued_resource": asked}


# --- the file that outlives whoever watches --------------------------------------------------------------


class Record:
    """The state of a launch, in a JSON file.

    Attributes:
        attempt: number of the resource that was asked for last, from 1.
        phase: "create" (being asked for), "watch" (it exists), "delete" (being given back), "ended".
        history: what happened when, oldest first.
    """

    def __init__(self, path: Path, asked: dict[str, Any]):
        """Reads `path`, or begins it with `asked`: job, topology and place as plain values.

        Raises:
            ConfigError: the file is of another launch.
        """
        self.path, self.asked = path, json.loads(json.dumps(asked))
        self.attempt, self.phase, self.history = 1, "create", []
        if path.exists():
            try:
                found = json.loads(path.read_text())
                there = found["asked"]
                self.attempt, self.phase, self.history = (found[k] for k in ("attempt", "phase", "history"))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}: not the state of a launch") from error
            odd = sorted(k for k in {*there, *self.asked} if there.get(k) != self.asked.get(k))
            if odd:
                raise ConfigError(
                    f"{path} is of another launch: {', '.join(odd)} differ; give another --state, or end "
                    "it with --delete first"
                )

    @property
    def resource(self) -> str:
        """The one that was asked for last."""
        return f"{self.asked['job']['name']}-{self.attempt}"

    def write(self, phase: str, what: str) -> None:
        """What is about to happen, or has; on disk when this returns."""
        self.phase = phase
        self.history.append({"time": time.time(), "attempt": self.attempt, "phase": phase, "what": what})
        known = {"asked": self.asked, "attempt": self.attempt, "phase": phase, "history": self.history}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(known, indent=1) + "\n").encode())


def asked(job: Job, topology: Topology, place: Place) -> dict[str, Any]:
    """What a launch is told by, as plain values."""
    return {"job": asdict(job), "topology": str(topology), "place": asdict(place)}


# --- watching --------------------------------------------------------------------------------------------


def client():
    """Google's client, with the credentials of this machine.

    Raises:
        ConfigError: it is not installed, or there are no credentials.
    """
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import tpu_v2
    except ImportError as error:
        raise ConfigError("queued resources need Google's client: pip install 'umm_jax[launch]'") from error
    try:
        return tpu_v2.TpuClient()
    except DefaultCredentialsError as error:
        raise ConfigError("no credentials; run gcloud auth application-default login") from error


def run(
    service: Any,
    record: Record,
    job: Job,
    topology: Topology,
    place: Place,
    *,
    say: Callable[[str], None],
    poll: float = POLL,
) -> str:
    """Asks for the slices, and for new ones after each preemption, until the run has ended.

    Args:
        service: a ``TpuClient``. record: where the launch stands; it goes on from there.
        say: told of every change.

    Returns:
        one line on how it ended.

    Raises:
        DeviceError: quota, permission, a request that failed for good.
        Interrupted: Ctrl-C; what was asked for stays asked for.
    """
    seen = ""
    try:
        while record.phase != "ended":
            if record.phase == "create":
                _create(service, record, request(job, topology, place, record.resource), say)
                continue
            state, why = _look(service, place.name(record.resource), say)
            if state != seen:
                say(f"{record.resource}: {state.lower().replace('_', ' ')}{why and f' ({why})'}")
                if state == "ACTIVE":
                    record.write("watch", "active")
            if state == "NOT_FOUND":
                if record.phase == "delete":
                    record.attempt += 1
                    record.write("create", "asking again")
                else:
                    record.write("ended", "the machines have given themselves back")
            elif state in ("SUSPENDED", "FAILED") and record.phase == "watch":
                if state == "FAILED" and not _again(why):
                    raise DeviceError(f"{record.resource} failed: {why}")
                if record.attempt > job.restarts:
                    raise DeviceError(f"{job.name}: asked for {record.attempt} times: given up")
                record.write("delete", why or state.lower())
                _delete(service, place.name(record.resource), say)
            elif record.phase == "delete" and state not in ("DELETING", seen):
                _delete(service, place.name(record.resource), say)
            seen = state
            if record.phase in ("watch", "delete"):
                time.sleep(poll)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped watching; {record.resource} goes on without us. The same command watches it "
            "again, --delete ends it"
        ) from None
    return f"ended: {record.history[-1]['what']}; see {job.workdir}"


def delete(service: Any, record: Record, job: Job, place: Place, *, say: Callable[[str], None]) -> None:
    """Gives back what was asked for last; no new one is asked for."""
    name = place.name(record.resource)
    if _look(service, name, say)[0] != "NOT_FOUND":
        _delete(service, name, say)
    record.write("ended", "deleted")


def _create(service, record: Record, body: dict[str, Any], say) -> None:
    from google.api_core import exceptions
    from google.cloud import tpu_v2

    resource = body["queued_resource_id"]
    record.write("create", f"asking for {resource}")
    # As JSON, which spells durations as the API's documentation does.
    parsed = tpu_v2.CreateQueuedResourceRequest.from_json(json.dumps(body))
    try:
        _call(lambda: service.create_queued_resource(request=parsed, timeout=60), say)
    except exceptions.AlreadyExists:
        say(f"{resource}: was asked for already")
    record.write("watch", f"asked for {resource}")


def _delete(service, name: str, say) -> None:
    from google.api_core import exceptions
    from google.cloud import tpu_v2

    try:
        body = tpu_v2.DeleteQueuedResourceRequest(name=name, force=True)
        _call(lambda: service.delete_queued_resource(request=body, timeout=60), say)
    except exceptions.NotFound:
        pass


def _look(service, name: str, say) -> tuple[str, str]:
    """(state, why it failed or ""); NOT_FOUND where there is no such resource."""
    from google.api_core import exceptions

    try:
        found = _call(lambda: service.get_queued_resource(name=name, timeout=60), say)
    except exceptions.NotFound:
        return "NOT_FOUND", ""
    error = found.state.failed_data.error if found.state.failed_data else None
    return found.state.state.name, " ".join(error.message.split()) if error else ""


def _again(why: str) -> bool:
    """Whether a request that failed so is worth repeating: no capacity, or the service was at fault."""
    return any(word in why.lower() for word in ("capacity", "stockout", "unavailable", "internal"))


def _call(function: Callable[[], Any], say: Callable[[str], None], pause: float = 5.0, tries: int = 5) -> Any:
    """What `function` returns, tried again while the service is away.

    Raises:
        DeviceError: what only the user can mend, in one line.
    """
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    for left in reversed(range(tries)):
        try:
            return function()
        except (
            exceptions.ServiceUnavailable,
            exceptions.DeadlineExceeded,
            exceptions.InternalServerError,
        ) as e:
            if not left:
                raise DeviceError(f"Cloud TPU does not answer: {_line(e)}") from e
            say(f"Cloud TPU does not answer, trying again ({_line(e)})")
            time.sleep(pause)
        except (exceptions.Unauthenticated, GoogleAuthError) as e:
            raise DeviceError(
                f"credentials are refused ({_line(e)}); run gcloud auth application-default login"
            ) from e
        except exceptions.PermissionDenied as e:
            raise DeviceError(f"no permission: {_line(e)}") from e
        except exceptions.ResourceExhausted as e:
            raise DeviceError(f"quota: {_line(e)}; ask for more, or for another zone or topology") from e
        except (exceptions.InvalidArgument, exceptions.FailedPrecondition) as e:
            raise DeviceError(f"Cloud TPU refuses the request: {_line(e)}") from e


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", error)).split())[:200]
