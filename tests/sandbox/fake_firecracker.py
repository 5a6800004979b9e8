"""What stands in for Firecracker: its API and its states, enforced, and behind them an emulated QEMU.

    python -m tests.sandbox.fake_firecracker --api-sock PATH --id NAME

It takes what Firecracker takes and refuses the rest as Firecracker does; a machine really boots, is saved, and
goes on from what was saved. Two things are not as there: the guest's virtio socket is a port of a console device
(this host's kernel has no such sockets for an emulator), and what makes emulation work is added to the kernel's
command line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from aiohttp import web
from qemu.qmp import ConnectError, QMPClient

from hadal.node.guest_program import guest_program
from hadal.node.machines.firecracker.api import ApiError, State, find_request
from hadal.node.wire import PortReader, port_bytes

NOT_NOW = "The requested operation is not supported {} starting the microVM."
AT = Path("/tmp")


class Refused(Exception):
    """What Firecracker answers with status 400."""


class FakeFirecracker:
    """One microVM."""

    def __init__(self):
        self.state = State.NOT_STARTED
        self.config = {"drives": [], "network": []}
        self.monitor = QMPClient("fake")
        self.line = None

    async def answer(self, request):
        """Take one request of the API."""
        body = await request.json() if request.can_read_body else None
        try:
            known = find_request(request.method, request.path, body)
            if self.state not in known.states:
                when = "before" if self.state is State.NOT_STARTED else "after"
                raise Refused(NOT_NOW.format(when))
            if known.fresh and self.config != {"drives": [], "network": []}:
                raise Refused(
                    "Loading a microVM snapshot not allowed after configuring boot-specific resources."
                )
            said = await self.do(known.path, body)
        except (ApiError, Refused) as error:
            return web.json_response({"fault_message": str(error)}, status=400)
        return web.Response(status=204) if said is None else web.json_response(said)

    async def do(self, path, body):
        """Do what is allowed now."""
        config = self.config
        match path:
            case "/":
                about = {"app_name": "Firecracker", "id": "machine", "vmm_version": "1.17.0"}
                return about | {"state": str(self.state)}
            case "/version":
                return {"firecracker_version": "1.17.0"}
            case "/drives/{id}":
                self.open_or_refuse(body["path_on_host"], writes=not body["is_read_only"])
                config["drives"].append(body)
            case "/network-interfaces/{id}":
                config["network"].append(body)
            case "/actions":
                await self.boot()
            case "/vm":
                await self.set_running(body["state"])
            case "/snapshot/create":
                await self.save(Path(body["snapshot_path"]), Path(body["mem_file_path"]))
            case "/snapshot/load":
                await self.load(body)
            case _:
                config[path.removeprefix("/")] = body
        return None

    def open_or_refuse(self, path, *, writes):
        try:
            os.close(os.open(path, os.O_RDWR if writes else os.O_RDONLY))
        except OSError as error:
            raise Refused(f"Unable to open the file {path}: {error}") from error

    async def boot(self):
        if "boot-source" not in self.config:
            raise Refused("Cannot start microvm without kernel configuration.")
        memory = os.memfd_create("fake")
        os.truncate(memory, self.config["machine-config"]["mem_size_mib"] << 20)
        await self.start(memory, share=True)
        await self.monitor.execute("cont")
        self.state = State.RUNNING

    async def set_running(self, wanted):
        await self.monitor.execute("cont" if wanted == "Resumed" else "stop")
        self.state = State.RUNNING if wanted == "Resumed" else State.PAUSED

    async def save(self, devices, memory):
        if self.line is not None:
            self.line.close()  # connections to the guest end
        own = AT / "devices"
        await self.monitor.execute("xen-save-devices-state", {"filename": str(own), "live": False})
        about = json.dumps(self.config).encode()
        devices.write_bytes(len(about).to_bytes(4, "big") + about + own.read_bytes())
        own.unlink()
        with memory.open("wb") as file:
            await asyncio.to_thread(self.copy_memory, file)

    def copy_memory(self, file):
        """What QEMU sees of the memory."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        parts = [line.split() for line in maps if "/memfd:" in line]
        with Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as memory:
            for part in parts:
                start, end = (int(a, 16) for a in part[0].split("-"))
                while start < end:
                    memory.seek(start)
                    data = memory.read(min(1 << 20, end - start))
                    file.seek(int(part[2], 16) + start - int(part[0].split("-")[0], 16))
                    file.write(data)
                    start += len(data)

    async def load(self, body):
        saved = await asyncio.to_thread(Path(body["snapshot_path"]).read_bytes)
        size = int.from_bytes(saved[:4], "big")
        self.config = json.loads(saved[4 : 4 + size])
        devices = AT / "loaded"
        devices.write_bytes(saved[4 + size :])
        memory = os.open(body["mem_backend"]["backend_path"], os.O_RDWR)
        await self.start(memory, share=False, incoming=devices)
        self.state = State.PAUSED

    async def start(self, memory, *, share, incoming=None):
        """Start QEMU, and let it stand still."""
        os.set_inheritable(memory, True)
        call = self.call(memory, share, incoming)
        self.process = subprocess.Popen(call, close_fds=False, stdin=subprocess.DEVNULL)  # noqa: ASYNC220
        while True:
            if self.process.poll() is not None:
                raise Refused("QEMU has ended")
            with contextlib.suppress(ConnectError):  # it does not listen yet
                await self.monitor.connect(str(AT / "qmp"))
                break
            await asyncio.sleep(0.005)
        while (await self.monitor.execute("query-status"))["status"] == "inmigrate":  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        self.vsock = await asyncio.start_unix_server(
            self.connect_guest, self.config["vsock"]["uds_path"]
        )

    def call(self, memory, share, incoming):
        config = self.config
        size = config["machine-config"]["mem_size_mib"]
        khz = int(subprocess.run([guest_program(), "tsc"], capture_output=True, check=True).stdout)
        words = config["boot-source"]["boot_args"].split()
        line = " ".join(w for w in words if not w.startswith("hadal_vsock=") and w != "reboot=k")
        line += f" reboot=t mitigations=off tsc_early_khz={config.setdefault('khz', khz)}"
        assert "hadal_vsock=52" in words
        call = [
            shutil.which("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
            "-object", f"memory-backend-file,id=memory,size={size}M,mem-path=/proc/self/fd/{memory},share={'on' if share else 'off'}",
            "-global", "migration.send-configuration=off",
            "-M", "microvm,pic=off,pit=off,rtc=on,suppress-vmdesc=on,memory-backend=memory", "-accel", "tcg,tb-size=128", "-cpu", "max",
            "-smp", str(config["machine-config"]["vcpu_count"]), "-m", str(size),
            "-serial", "stdio", "-qmp", f"unix:{AT}/qmp,server=on,wait=off",
            "-device", "virtio-serial-device", "-chardev", f"socket,id=port,path={AT}/port,server=on,wait=off",
            "-device", "virtserialport,chardev=port,name=hadal", "-device", "virtio-rng-device",
            "-kernel", config["boot-source"]["kernel_image_path"], "-initrd", config["boot-source"]["initrd_path"], "-append", line,
        ]  # fmt: skip
        for drive in config["drives"]:
            fixed = "on" if drive["is_read_only"] else "off"
            name, path = drive["drive_id"], drive["path_on_host"]
            call += [
                "-blockdev",
                f"raw,node-name={name},read-only={fixed},file.driver=file,file.filename={path}",
            ]
            call += ["-device", f"virtio-blk-device,drive={name}"]
        for card in config["network"]:
            call += [
                "-netdev",
                f"tap,id=network,ifname={card['host_dev_name']},script=no,downscript=no",
            ]
            call += ["-device", "virtio-net-device,netdev=network"]
        return call + (["-incoming", f"exec:cat {incoming}"] if incoming else [])

    async def connect_guest(self, reader, writer):
        """Be the virtio socket: `CONNECT PORT`, and then what goes through the port of the guest."""
        with (
            contextlib.closing(writer),
            contextlib.suppress(ConnectionError, asyncio.IncompleteReadError),
        ):
            asked = await reader.readuntil(b"\n")
            ports = {p["label"]: p for p in await self.monitor.execute("query-chardev")}
            if asked != b"CONNECT 52\n" or not ports["port"]["frontend-open"]:
                return
            if self.line is not None:
                self.line.close()
            self.line = writer
            near, far = await asyncio.open_unix_connection(str(AT / "port"))
            with contextlib.closing(far):
                writer.write(b"OK 1073741824\n")
                far.write(port_bytes(b"", begins=True))
                await self.pass_on(reader, writer, near, far)

    async def pass_on(self, reader, writer, near, far):
        async def outwards():
            whole = PortReader()
            while data := await near.read(1 << 16):
                writer.write(b"".join(whole.read(data)))
                await writer.drain()

        async def inwards():
            while data := await reader.read(1 << 16):
                far.write(port_bytes(data))
                await far.drain()

        both = {asyncio.create_task(outwards()), asyncio.create_task(inwards())}
        _, left = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()


async def main():
    """Serve until QEMU ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-sock", required=True)
    parser.add_argument("--id", required=True)
    options = parser.parse_args()
    fake = FakeFirecracker()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, options.api_sock).start()
    while getattr(fake, "process", None) is None or fake.process.poll() is None:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())
