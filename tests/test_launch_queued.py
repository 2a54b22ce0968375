"""Queued resources against a local server that speaks Cloud TPU's gRPC service, and against nothing else."""

import json
import os
import subprocess
import threading
import time
from concurrent import futures

import pytest

from umm_jax import cli
from umm_jax.errors import ConfigError, DeviceError
from umm_jax.launch import queued
from umm_jax.launch.job import Job
from umm_jax.launch.queued import Place, Record
from umm_jax.plan.chips import topology

grpc = pytest.importorskip("grpc", reason="queued resources are of the extra launch")
pytest.importorskip("google.cloud.tpu_v2", reason="queued resources are of the extra launch")

JOB = Job("mm", "configs/world_tiny.py", "/mnt/runs/mm", env={"A": "b c"}, restarts=3)
PLACE = Place("proj", "us-east5-a", "img:1", spot=True)
SLICE = topology("v5p:4x4x4", 2)


class Server:
    """Plays a script: for each resource the states that looking at it finds, one a look, the last for ever.

    A state is a name, "gone", "FAILED message", or a grpc.StatusCode that the call ends with.
    """

    def __init__(self, *scripts, refuse=()):
        from google.cloud.tpu_v2.types import cloud_tpu
        from google.longrunning import operations_pb2

        self.types, self.operation = cloud_tpu, operations_pb2.Operation
        self.scripts, self.refuse = list(scripts), list(refuse)
        self.alive: dict[str, list[str]] = {}
        self.created, self.deleted = [], []
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        method = lambda function, kind: grpc.unary_unary_rpc_method_handler(  # noqa: E731
            function, kind.deserialize, lambda answer: answer
        )
        handlers = {
            "CreateQueuedResource": method(self._create, cloud_tpu.CreateQueuedResourceRequest),
            "GetQueuedResource": method(self._get, cloud_tpu.GetQueuedResourceRequest),
            "DeleteQueuedResource": method(self._delete, cloud_tpu.DeleteQueuedResourceRequest),
        }
        service = grpc.method_handlers_generic_handler("google.cloud.tpu.v2.Tpu", handlers)
        self.server.add_generic_rpc_handlers((service,))
        self.port = self.server.add_insecure_port("localhost:0")
        self.server.start()

    def client(self):
        from google.cloud import tpu_v2
        from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

        channel = grpc.insecure_channel(f"localhost:{self.port}")
        return tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))

    def _create(self, request, context):
        if self.refuse:
            context.abort(*self.refuse.pop(0))
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        if name in self.alive:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "it is there")
        self.created.append(request)
        self.alive[name] = list(self.scripts.pop(0))
        return self.operation(name="operations/1").SerializeToString()

    def _get(self, request, context):
        states = self.alive.get(request.name)
        if states is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such resource")
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, grpc.StatusCode):
            context.abort(state, "a moment")
        if state == "gone":
            del self.alive[request.name]
            context.abort(grpc.StatusCode.NOT_FOUND, "no such resource")
        name, _, message = state.partition(" ")
        kind = self.types.QueuedResourceState
        made = kind(state=kind.State[name])
        if message:
            made.failed_data = kind.FailedData(error={"message": message})
        answer = self.types.QueuedResource(name=request.name, state=made)
        return self.types.QueuedResource.serialize(answer)

    def _delete(self, request, context):
        assert request.force
        if request.name not in self.alive:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such resource")
        self.deleted.append(request.name.rpartition("/")[2])
        self.alive[request.name] = ["DELETING", "gone"]
        return self.operation(name="operations/2").SerializeToString()


@pytest.fixture
def play():
    servers = []

    def start(*scripts, **options):
        servers.append(Server(*scripts, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.server.stop(None)


def watch(server, path, job=JOB, place=PLACE):
    said = []
    record = Record(path, queued.asked(job, SLICE, place))
    try:
        return queued.run(server.client(), record, job, SLICE, place, say=said.append, poll=0.01), said
    except DeviceError as error:
        error.said = said
        raise


def phases(path):
    return [(entry["attempt"], entry["phase"]) for entry in json.loads(path.read_text())["history"]]


def test_fake_grpc_server_provisions_and_the_run_ends(play, tmp_path):
    server = play(["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "gone"])
    ended, said = watch(server, tmp_path / "s" / "mm.json")
    assert "given themselves back" in ended and "/mnt/runs/mm" in ended
    assert [text.partition(": ")[2] for text in said] == [
        "accepted",
        "waiting for resources",
        "provisioning",
        "active",
        "not found",
    ]
    (request,) = server.created
    (spec,) = request.queued_resource.tpu.node_spec
    assert spec.node.accelerator_type == "v5p-128" and spec.multislice_params.node_count == 2
    assert "spot" in request.queued_resource and "guaranteed" not in request.queued_resource
    assert phases(tmp_path / "s" / "mm.json")[-1] == (1, "ended")
    # Said again, it is ended: nothing is asked for.
    watch(server, tmp_path / "s" / "mm.json")
    assert len(server.created) == 1


def test_fake_grpc_server_preempts_and_a_new_resource_is_asked_for(play, tmp_path):
    server = play(["ACTIVE", "SUSPENDING", "SUSPENDED"], ["ACTIVE", "SUSPENDED"], ["ACTIVE", "gone"])
    watch(server, tmp_path / "mm.json")
    assert [request.queued_resource_id for request in server.created] == ["mm-1", "mm-2", "mm-3"]
    assert server.deleted == ["mm-1", "mm-2"]


def test_fake_grpc_server_is_out_of_stock_once(play, tmp_path):
    server = play(["FAILED There is no more capacity in the zone"], ["ACTIVE", "gone"])
    watch(server, tmp_path / "mm.json")
    assert [request.queued_resource_id for request in server.created] == ["mm-1", "mm-2"]


def test_fake_grpc_server_is_out_of_stock_for_ever(play, tmp_path):
    server = play(*[["FAILED stockout"]] * 9)
    with pytest.raises(DeviceError, match="asked for 4 times: given up"):
        watch(server, tmp_path / "mm.json")


@pytest.mark.parametrize(
    "code, message, words",
    [
        (
            "RESOURCE_EXHAUSTED",
            "Quota 'TPUV5PPerProject' exceeded",
            "quota: .*TPUV5PPerProject.*another zone",
        ),
        ("PERMISSION_DENIED", "tpu.nodes.create denied", "no permission: .*tpu.nodes.create"),
        ("UNAUTHENTICATED", "bad token", "credentials are refused .*gcloud auth application-default login"),
        ("INVALID_ARGUMENT", "no such runtime", "refuses the request: .*no such runtime"),
    ],
)
def test_fake_grpc_server_refuses_in_one_line(play, tmp_path, code, message, words):
    server = play(["ACTIVE"], refuse=[(grpc.StatusCode[code], message)])
    with pytest.raises(DeviceError, match=words) as caught:
        watch(server, tmp_path / "mm.json")
    assert "\n" not in str(caught.value)
    # What was mended goes on from there.
    server.alive.clear()
    server.scripts = [["ACTIVE", "gone"]]
    watch(server, tmp_path / "mm.json")


def test_fake_grpc_server_fails_for_good(play, tmp_path):
    server = play(["FAILED the image of the machine does not exist"])
    with pytest.raises(DeviceError, match="mm-1 failed: the image of the machine"):
        watch(server, tmp_path / "mm.json")
    assert not server.deleted


def test_fake_grpc_server_is_away_for_a_moment(play, tmp_path, monkeypatch):
    monkeypatch.setattr(queued.time, "sleep", lambda seconds: None)
    away = grpc.StatusCode.UNAVAILABLE
    server = play(["ACTIVE", away, away, "ACTIVE", "gone"])
    _, said = watch(server, tmp_path / "mm.json")
    assert sum("does not answer, trying again" in text for text in said) == 2


@pytest.mark.parametrize("dies", range(1, 7))
def test_a_dead_laptop_is_picked_up_from_the_file_against_a_fake_grpc_server(
    play, tmp_path, monkeypatch, dies
):
    """It dies at each of the places where the state is written; nothing is asked for twice, or forgotten."""
    server = play(["ACTIVE", "SUSPENDED"], ["ACTIVE", "gone"])
    whole, count = Record.write, 0

    def write(self, *arguments):
        nonlocal count
        whole(self, *arguments)
        count += 1
        if count == dies:
            raise RuntimeError("the laptop is closed")

    monkeypatch.setattr(Record, "write", write)
    with pytest.raises(RuntimeError):
        watch(server, tmp_path / "mm.json")
    ended, _ = watch(server, tmp_path / "mm.json")
    assert ended.startswith("ended")
    assert [request.queued_resource_id for request in server.created] == ["mm-1", "mm-2"]
    assert not server.alive


def test_delete_gives_back_against_a_fake_grpc_server(play, tmp_path):
    server = play(["ACTIVE"])
    path = tmp_path / "mm.json"
    record = Record(path, queued.asked(JOB, SLICE, PLACE))
    ended = threading.Thread(
        target=lambda: queued.run(server.client(), record, JOB, SLICE, PLACE, say=print, poll=0.01),
        daemon=True,
    )
    ended.start()
    while not path.exists() or '"active"' not in path.read_text():
        time.sleep(0.01)
    other = Record(path, queued.asked(JOB, SLICE, PLACE))
    queued.delete(server.client(), other, JOB, PLACE, say=print)
    ended.join(20)
    assert not ended.is_alive() and server.deleted == ["mm-1"] and len(server.created) == 1
    assert phases(path)[-1][1] == "ended"


def test_a_state_of_another_launch_is_refused(tmp_path):
    path = tmp_path / "mm.json"
    Record(path, queued.asked(JOB, SLICE, PLACE)).write("watch", "asked")
    with pytest.raises(ConfigError, match="of another launch: topology differ"):
        Record(path, queued.asked(JOB, topology("v5e:4x4"), PLACE))
    path.write_text('{"asked"')
    with pytest.raises(ConfigError, match="not the state of a launch"):
        Record(path, queued.asked(JOB, SLICE, PLACE))


def test_dry_run_prints_what_would_be_asked_for_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = os.path.join(os.path.dirname(__file__), "..", "configs", "world_tiny.py")
    argv = ["launch", "queued", f"--config={config}", "--workdir=/mnt/w", "--name=tiny", "--image=i:1"]
    argv += ["--topology=v6e:4x4", "--project=p", "--zone=z", "--reservation=mine", "--hours=2", "--dry-run"]
    cli.dispatch(argv)
    word, _, text = capsys.readouterr().out.partition(" ")
    body = json.loads(text)
    assert word == "CreateQueuedResource" and body["parent"] == "projects/p/locations/z"
    asked = body["queued_resource"]
    assert asked["reservation_name"].endswith("/reservations/mine") and "spot" not in asked
    assert asked["queueing_policy"] == {"valid_until_duration": "7200s"}
    assert asked["tpu"]["node_spec"][0]["node"]["runtime_version"] == "v2-alpha-tpuv6e"
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="exclude each other"):
        cli.dispatch([*argv, "--spot"])


@pytest.mark.parametrize("statuses, starts, last", [([0], 1, "0"), ([143, 75, 0], 3, "0"), ([2], 1, "2")])
def test_the_startup_script_starts_again_what_is_worth_it_against_fake_commands(
    tmp_path, statuses, starts, last
):
    for name, text in {
        "docker": f'echo "$@" >> {tmp_path}/docker.said\nn=$(wc -l < {tmp_path}/docker.said)\n'
        f"set -- {' '.join(map(str, statuses))}\nshift $((n - 1))\nexit $1\n",
        "sleep": "",
        "curl": f'echo "$@" >> {tmp_path}/curl.said\necho \'{{"access_token": "t"}}\'\n',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    job = Job("mm", "configs/world_tiny.py", str(tmp_path / "work dir"), env={"A": "b c"}, restarts=3)
    script = queued.startup_script(job, PLACE, "mm-1")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "docker.said").read_text().splitlines()
    assert len(said) == starts and "umm train" in said[0] and "A=b c" in said[0]
    (status,) = (tmp_path / "work dir" / "launch").glob("mm-1-*.status")
    assert status.read_text().strip() == last
    calls = (tmp_path / "curl.said").read_text().splitlines()
    assert (
        "DELETE" in calls[-1] and "queuedResources/mm-1?force=true" in calls[-1] and "Bearer t" in calls[-1]
    )
