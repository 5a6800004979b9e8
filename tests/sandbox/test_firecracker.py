"""MicroVMs on Firecracker's API: what is asked of it, what it answers, and machines behind what stands in for it."""

import asyncio
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from aiohttp import web

from hadal.errors import NodeError, UnsupportedError
from hadal.node.machines import kvm
from hadal.node.machines.firecracker import hypervisor
from hadal.node.machines.firecracker.api import REQUESTS, ApiError, find_request
from hadal.node.machines.firecracker.monitor import FirecrackerMonitor
from hadal.node.machines.firecracker.vsock import connect_vsock
from hadal.node.machines.plan import Plan
from hadal.node.machines.qemu import Hardware
from hadal.sandbox import MicroVMSpec, NetworkPolicy, Sandbox
from hadal.sandbox.testing import all_checks
from tests.sandbox.conftest import needs_root
from tests.sandbox.machine_image import import_image, needs_machines
from tests.sandbox.network_lab import needs_network
from tests.sandbox.test_crashes import Daemon


def plan(tmp_path, layers=2, network=True):
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"MZ")
    hardware = Hardware(
        board="microvm", memory_mb=256, cpus=2, layers=layers, network=network, accelerator="kvm", tsc_khz=0
    )  # fmt: skip
    return Plan(
        hypervisor="firecracker", program="firecracker", hardware=hardware, options={"layers": layers}, disk=(0, 0),
        layers=(), kernel=(kernel, kernel),
    )  # fmt: skip


def test_all_that_is_asked_is_in_the_api(tmp_path):
    asked = [*hypervisor.configuration(plan(tmp_path)), *hypervisor.restoration()]
    for path, body in asked:
        find_request("PUT", path, body)
    paths = [path for path, _ in asked]
    assert paths[-2:] == ["/actions", "/snapshot/load"]
    assert [p for p in paths if p.startswith("/drives")] == [
        "/drives/layer0", "/drives/layer1", "/drives/scratch",
    ]  # fmt: skip
    line = dict(asked)["/boot-source"]["boot_args"]
    assert "reboot=k" in line
    assert "hadal_layers=2 hadal_vsock=52 hadal_ordered=1" in line
    without = dict(hypervisor.configuration(plan(tmp_path, network=False)))
    assert not any(path.startswith("/network") for path in without)


def test_more_layers_than_there_are_interrupts_for(tmp_path):
    hypervisor.configuration(plan(tmp_path, layers=14))
    with pytest.raises(UnsupportedError, match="an image of 15 layers"):
        hypervisor.configuration(plan(tmp_path, layers=15))


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("PUT", "/kernel", {}, "Invalid request method and/or path"),
        ("POST", "/vm", {"state": "Paused"}, "Invalid request method and/or path"),
        ("PATCH", "/vm", {"state": "Stopped"}, "state"),
        ("PATCH", "/vm", None, "no body"),
        ("GET", "/", {}, "a body"),
        ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}, "guest_cid"),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v", "vsock": "1"}, "vsock"),
        ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}, "vcpu_count"),
        ("PUT", "/machine-config", {"vcpu_count": "2", "mem_size_mib": 128}, "vcpu_count"),
        ("PUT", "/drives/a", {"drive_id": "b", "path_on_host": "x", "is_root_device": False,
                              "is_read_only": True}, "does not match"),
        ("PUT", "/drives/a b", {}, "Invalid request method and/or path"),
        ("PUT", "/snapshot/load", {"snapshot_path": "x"}, "mem_backend"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_api(method, path, body, said):
    with pytest.raises(ApiError, match=said):
        find_request(method, path, body)


def test_every_request_has_its_state():
    assert len({(r.method, r.path) for r in REQUESTS}) == len(REQUESTS)
    assert [r.path for r in REQUESTS if r.fresh] == ["/snapshot/load"]


def with_server(answer, body, path):
    """Run a coroutine function beside a server of the API that answers so."""

    async def main():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        try:
            await body()
        finally:
            await runner.cleanup()

    asyncio.run(main())


ABOUT = {
    "app_name": "Firecracker",
    "id": "machine",
    "state": "Not started",
    "vmm_version": "1.17.0",
}


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (400, json.dumps({"fault_message": "no room " * 1000}), "refuses GET /: no room"),
        (500, "", "refuses GET /: status 500"),
        (200, "{", "does not answer GET /"),
        (200, json.dumps(ABOUT | {"app_name": "Other"}), "is not Firecracker"),
        (200, "[" * 200_000, "does not answer GET /"),
    ],
)
def test_answers_that_are_no_good(tmp_path, status, text, said):
    async def answer(_):
        return web.Response(status=status, text=text)

    async def body():
        with pytest.raises(NodeError, match=said) as raised:
            await FirecrackerMonitor.connect(tmp_path / "api")
        assert len(raised.value.message) < 700

    with_server(answer, body, tmp_path / "api")


@pytest.mark.parametrize(
    ("version", "enough"), [("1.16.2", False), ("1.17.0-dev", True), ("2.0.0", True)]
)
def test_a_version_that_boots_no_packed_kernel(tmp_path, version, enough):
    async def answer(request):
        if request.path == "/":
            return web.json_response(ABOUT)
        return web.json_response({"firecracker_version": version})

    async def body():
        monitor = await FirecrackerMonitor.connect(tmp_path / "api")
        if enough:
            await monitor.check_version()
        else:
            with pytest.raises(UnsupportedError, match=r"Firecracker 1\.16\.2 boots no kernel"):
                await monitor.check_version()

    with_server(answer, body, tmp_path / "api")


def test_one_that_does_not_answer(tmp_path):
    async def answer(_):
        await asyncio.sleep(60)

    async def body():
        monitor = FirecrackerMonitor(tmp_path / "api")
        with pytest.raises(NodeError, match="does not answer PATCH /vm: TimeoutError"):
            await monitor.tell("PATCH", "/vm", {"state": "Paused"}, timeout_s=0.2)

    with_server(answer, body, tmp_path / "api")


def test_a_link_in_the_place_of_its_socket_is_not_followed(tmp_path):
    async def main():
        for name in ("api", "vsock"):
            (tmp_path / name).symlink_to("/run/other")
        with pytest.raises(NodeError):
            await FirecrackerMonitor.connect(tmp_path / "api")
        with pytest.raises(NodeError, match="is no socket"):
            await connect_vsock(tmp_path / "vsock", 52, 1.0)

    asyncio.run(main())


def test_a_guest_that_listens_later(tmp_path):
    """Firecracker ends connections to ports on which nobody listens."""

    async def main():
        asked, served = [], []

        async def serve(reader, writer):
            served.append(asyncio.current_task())
            asked.append(await reader.readline())
            if len(asked) == 3:
                writer.write(b"OK 1073741824\nand more")
                await reader.read()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_unix_server(serve, tmp_path / "vsock")
        async with server:
            connected = await connect_vsock(tmp_path / "vsock", 52, 10.0)
            assert asked == [b"CONNECT 52\n"] * 3
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(connected, 100) == b"and more"
            connected.close()
            asked.extend([b""] * 100)
            with pytest.raises(NodeError, match="no guest listens on port 52"):
                await connect_vsock(tmp_path / "vsock", 52, 0.1)
            await asyncio.wait(served)

    asyncio.run(main())


# --- machines ---


@pytest.fixture(scope="module")
def real():
    """Whether Firecracker itself is used: `make firecracker-check`."""
    wanted = os.environ.get("HADAL_FIRECRACKER_CHECK") == "1"
    if wanted:
        assert shutil.which("firecracker"), "no firecracker in the path"
        assert kvm.kvm_fault() is None, f"KVM runs no guest here: {kvm.kvm_fault()}"
    return wanted


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, kernel, real):
    if os.geteuid() != 0:
        pytest.skip("boxes are made by root")
    needs_machines()
    found = Daemon(tmp_path_factory.mktemp("fc") / "n", module="tests.sandbox.firecracker_daemon")
    found.image = import_image(found.state / "images", tmp_path_factory.mktemp("image"))
    found.start()
    yield found
    found.end()
    assert "Traceback" not in found.log()


@pytest.fixture
def make(daemon):
    def made(**changes):
        spec = MicroVMSpec(image=daemon.image, memory_mb=256, **changes)
        return Sandbox.create(spec, node=daemon.url)

    return made


def hypervisors_of(daemon):
    return {path.read_text() for path in (daemon.state / "b").glob("*/hypervisor")}


@needs_root
def test_the_next_one_starts_from_what_the_first_has_left(make, daemon):
    with make() as first, make() as second:
        assert hypervisors_of(daemon) == {"firecracker"}
        assert (
            first.run("hostname; cat /etc/machine-id").stdout
            != second.run("hostname; cat /etc/machine-id").stdout
        )
        second.files.write("/home/f", "x" * 100_000)
        assert second.run("wc -c < /home/f").stdout == "100000\n"
        assert first.run("cat /home/f").exit_code == 1
        assert (
            first.run("head -c 8 /dev/urandom | od").stdout
            != second.run("head -c 8 /dev/urandom | od").stdout
        )
    assert len(list((daemon.state / "machines/templates").iterdir())) == 1


@pytest.mark.slow
@needs_root
def test_a_copy_is_made_while_commands_run_and_none_of_their_output_is_lost(make):
    """A snapshot ends the connection to the guest, and the machine that was copied goes on."""
    with make() as box:
        running = box.spawn(
            "for i in $(seq 1 400); do echo line $i; sleep 0.01; done; cat; echo end >&2",
            interactive=True,
        )
        running.write("given before\n")
        waiting = box.spawn("sleep 2; echo waited; exit 3")
        copies = []
        writer = threading.Thread(target=lambda: running.write("given meanwhile\n"))
        for _ in range(2):
            copies += box.fork(1)
            if not writer.ident:
                writer.start()
        writer.join()
        running.write("given after\n")
        running.close_stdin()
        result = running.wait()
        lines = [f"line {i}" for i in range(1, 401)]
        assert result.stdout.splitlines() == [
            *lines,
            "given before",
            "given meanwhile",
            "given after",
        ]
        assert (result.exit_code, result.stderr) == (0, "end\n")
        assert (waiting.wait().stdout, waiting.wait().exit_code) == ("waited\n", 3)
        names = {copy.run("hostname").stdout for copy in copies} | {box.run("hostname").stdout}
        assert len(names) == 3
        for copy in copies:
            copy.close()


@needs_root
def test_a_daemon_that_is_killed_finds_its_machines_again(make, daemon):
    with make() as box:
        running = box.spawn("sleep 3; echo late")
        box.run("echo kept > /home/f")
        daemon.kill()
        assert box.run("cat /home/f").stdout == "kept\n"
        assert running.wait().stdout == "late\n"


@needs_root
def test_one_that_is_kept_goes_on_later(make, daemon):
    with make() as box:
        box.run("echo kept > /dev/shm/f")
        reference = box.snapshot(kind="full")
    with Sandbox.create(MicroVMSpec(from_=reference, memory_mb=256), node=daemon.url) as box:
        assert box.run("cat /dev/shm/f").stdout == "kept\n"


@needs_root
def test_a_network_by_a_link_that_was_lent(make):
    with make(network=NetworkPolicy(default="deny")) as box:
        assert "eth0" in box.run("ip -o link show up").stdout
        assert box.run("ip route").stdout.startswith("default via ")
    with make(network=NetworkPolicy(default="none")) as box:
        assert "eth0" not in box.run("ip -o link").stdout


def conformance():
    for check in all_checks():
        if check.needs <= MicroVMSpec.capabilities:
            marks = [needs_network, pytest.mark.long] if check.slow else [needs_network]
            yield pytest.param(check, id=check.name, marks=marks)


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("check", list(conformance()))
def test_conformance(daemon, check, real):
    def make(*, trajectory=None, **changes):
        spec = MicroVMSpec(**{"image": daemon.image} | changes)
        return Sandbox.create(spec, node=daemon.url, trajectory=trajectory)

    check.run(make)


@needs_network
@needs_root
def test_one_that_sleeps_wakes_with_its_link_and_what_ran(make, daemon):
    """Its connection to the guest, too, also of another daemon."""
    with make(network=NetworkPolicy(default="deny")) as box:
        shown = box.run("ip -4 -o addr show eth0").stdout
        counting = box.spawn("for i in $(seq 1 300); do echo $i; sleep 0.01; done")
        for kill in (False, True):
            box.pause(reclaim=True)
            if kill:
                daemon.kill()
            assert box.info().state == "paused"
            assert not hypervisor_runs(box)
            assert box.run("ip -4 -o addr show eth0").stdout == shown
            box.run("timeout 5 bash -c '> /dev/tcp/192.0.2.9/80'")
            assert "192.0.2.9:80/tcp" in {d["target"] for d in box.network()["denials"]}
        assert counting.wait().stdout == "".join(f"{n}\n" for n in range(1, 301))


def hypervisor_runs(box):
    groups = Path("/sys/fs/cgroup").glob(f"**/hadal/*/{box.id}/cgroup.procs")
    return any(group.read_text() for group in groups)
