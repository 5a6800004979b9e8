"""The life of a box: its end and the reason for it, its log, coming back, branches."""

import hashlib
import time
import uuid

from hadal.errors import GoneCause, ReplayDivergedError, SandboxFileError, SandboxGoneError
from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, expect, holds

__all__ = [
    "an_end_meets_a_running_command",
    "busy_is_not_idle",
    "coming_back",
    "coming_back_with_something_else",
    "ends",
    "forks",
    "pauses",
    "replays",
    "sleeps",
    "snapshots",
    "the_log",
    "who_changed_it",
]


@check()
def ends(make: MakeBox) -> None:
    """Every end has its cause: killed, lifetime, idleness."""
    with make() as box:
        equal(box.kill(), True)
        with expect(SandboxGoneError) as caught:
            box.run("true")
        equal(caught.error.cause, GoneCause.KILLED)
        equal(box.kill(), False)
        equal(box.info().state, "gone")
    for field, cause in (("ttl_s", GoneCause.TTL), ("idle_s", GoneCause.IDLE)):
        with make(**{field: 0.5}) as box:
            time.sleep(1.3)
            with expect(SandboxGoneError) as caught:
                box.run("true")
            equal(caught.error.cause, cause)


@check()
def an_end_meets_a_running_command(make: MakeBox) -> None:
    """A command in a box that ends is told so at once."""
    with make(ttl_s=1) as box:
        began = time.monotonic()
        with expect(SandboxGoneError) as caught:
            box.run("sleep 60")
        holds(time.monotonic() - began < 5, "the caller waited")
        equal(caught.error.cause, GoneCause.TTL)


@check()
def busy_is_not_idle(make: MakeBox) -> None:
    """A box with a running command is in use."""
    with make(idle_s=0.6) as box:
        equal(box.run("sleep 1.5; echo done").stdout, "done\n")


@check()
def the_log(make: MakeBox) -> None:
    """What was done is written down, in order, without gaps."""
    with make() as box:
        box.run("echo one")
        box.files.write("/tmp/f", "content")
        box.run("exit 5")
        box.files.remove("/tmp/f")
        log = box.log()
        equal([e.position for e in log], [1, 2, 3, 4])
        equal([e.kind for e in log], ["command", "write", "command", "change"])
        equal({e.state for e in log}, {"done"})
        equal((log[2].result or {}).get("exit_code"), 5)
        equal(log[0].request, {"shell": "echo one"})
        holds(all((e.ended_ns or 0) >= e.began_ns for e in log), "times run backwards")


@check()
def coming_back(make: MakeBox) -> None:
    """Who comes back gets recorded results, and does not touch the box until something is new."""
    trajectory = f"check-{uuid.uuid4().hex}"
    first = make(trajectory=trajectory)
    first.detach()
    first.run("echo x >> /tmp/count; date +%N")
    first.files.write("/tmp/f", "content")
    third = first.run("cat /tmp/f; exit 3")
    again = make(trajectory=trajectory)
    with again:
        equal(again.id, first.id)
        replayed = again.run("echo x >> /tmp/count; date +%N")
        holds(replayed.recorded, "it was run again")
        again.files.write("/tmp/f", "content")
        equal(again.run("cat /tmp/f; exit 3").stdout, third.stdout)
        live = again.run("cat /tmp/count")
        equal((live.stdout, live.recorded), ("x\n", False))
    other = make(trajectory=f"check-{uuid.uuid4().hex}")
    with other:
        holds(not other.run("true").recorded, "another trajectory has its own log")


@check()
def coming_back_with_something_else(make: MakeBox) -> None:
    """A command that differs from the recorded one is an error, not a guess; a branch goes on otherwise."""
    trajectory = f"check-{uuid.uuid4().hex}"
    first = make(trajectory=trajectory)
    first.detach()
    first.run("echo 1 >> /tmp/steps")
    first.run("echo 2 >> /tmp/steps")
    with make(trajectory=trajectory) as again, make() as branch:
        again.run("echo 1 >> /tmp/steps")
        with expect(ReplayDivergedError) as caught:
            again.run("echo other >> /tmp/steps")
        equal(caught.error.position, 2)
        report = branch.replay(again.id, before=2)
        equal((report.steps, report.same, report.compared_files), (1, True, 0))
        branch.run("echo other >> /tmp/steps")
        equal(branch.run("cat /tmp/steps").stdout, "1\nother\n")


@check(Capability.FORK)
def forks(make: MakeBox) -> None:
    """Forks begin with the files of their parent and go their own ways."""
    with make() as box:
        box.run("mkdir /data; echo parent > /data/f; echo gone > /data/g; rm -f /etc/group")
        children = box.fork(3)
        for i, child in enumerate(children):
            equal(child.run("cat /data/f; test -e /etc/group || echo removed").stdout,
                  "parent\nremoved\n")  # fmt: skip
            child.run(f"echo {i} > /data/f; rm /data/g")
        equal(box.run("cat /data/f; ls /data | tr '\\n' ' '").stdout, "parent\nf g ")
        [grandchild] = children[1].fork()
        box.kill()
        children[1].kill()
        equal(grandchild.run("cat /data/f; ls /data").stdout, "1\nf\n")
        equal(children[2].run("cat /data/f").stdout, "2\n")
        for other in (grandchild, *children):
            other.kill()


@check(Capability.PAUSE)
def pauses(make: MakeBox) -> None:
    """A paused box stands still, and any request lets it go on."""
    with make() as box:
        box.spawn("while sleep 0.05; do echo . >> /tmp/ticks; done")
        before = int(
            box.run("while [ ! -s /tmp/ticks ]; do sleep 0.02; done; wc -l < /tmp/ticks").stdout
        )
        box.pause()
        equal(box.info().state, "paused")
        time.sleep(1)
        ticks = int(box.run("wc -l < /tmp/ticks").stdout) - before
        holds(ticks < 11, f"it went on: {ticks}")
        equal(box.info().state, "running")


@check(Capability.PAUSE)
def sleeps(make: MakeBox) -> None:
    """A paused box whose memory is given back goes on where it was: what runs in it loses and repeats nothing."""
    with make() as box:
        box.files.write("/tmp/f", "kept")
        counting = box.spawn("n=0; while [ $n -lt 60 ]; do n=$((n+1)); echo $n; sleep 0.02; done")
        box.run("sleep 0.2")
        box.pause(reclaim=True)
        equal(box.info().state, "paused")
        equal(box.files.read("/tmp/f"), b"kept")
        equal(box.info().state, "running")
        box.pause(reclaim=True)
        box.resume()
        equal(counting.wait().stdout, "".join(f"{n}\n" for n in range(1, 61)))


@check(Capability.DISK)
def who_changed_it(make: MakeBox) -> None:
    """The log says which command changed a file last, and the box what differs from its image."""
    with make() as box:
        box.run("echo a > /home/f; echo a > /home/g")
        box.run("sleep 0.05")
        box.run("echo b >> /home/f; rm -f /etc/group; mkdir /home/d; ln -s f /home/l")
        box.files.write("/home/h", "content")
        for path, did, did_not in (("/home/f", 3, 1), ("/home/g", 1, 3), ("/home/h", 4, 1)):
            blamed = {e.position for e in box.blame(path)}
            holds(did in blamed and did_not not in blamed, f"{path}: {blamed}, where it was {did}")
        found = {c.path: c for c in box.changes()}
        equal(found["/etc/group"].kind, "removed")
        equal(found["/home/h"].digest, hashlib.sha256(b"content").hexdigest())
        equal((found["/home/d"].directory, found["/home/l"].kind), (True, "written"))
        holds("/etc/passwd" not in found, "a file that nobody changed")
        unread = box.changes(content=False, limit=len(found))
        equal([c.path for c in unread], sorted(found))
        holds(all(c.digest is None for c in unread), "a digest that was not asked for")
        with expect(SandboxFileError):
            box.changes(limit=len(found) - 1)


@check(Capability.DISK)
def replays(make: MakeBox) -> None:
    """A session that is done again gives the same, and what differs is named."""
    with make() as box, make() as other, make() as third:
        box.run("mkdir /home/w; cd /home/w; seq 1 1000 > n; sort -r n | head -3")
        box.files.write("/home/w/prog.sh", "echo $(($1 * 2))", mode=0o755)
        box.run("sh /home/w/prog.sh 21; exit 4")
        box.run("tr a-z A-Z", stdin="some input")
        box.files.rename("/home/w/n", "/home/w/m")
        report = other.replay(box.id)
        equal((report.same, report.steps, report.differences), (True, 5, ()))
        holds(report.compared_files >= 4, "files were not compared")
        box.run("head -c 8 /dev/urandom > /home/w/random; od /home/w/random")
        report = third.replay(box.id)
        equal({(d.position, d.what) for d in report.differences}, {(6, "stdout"), (0, "file")})
        equal([d.subject for d in report.differences if d.what == "file"], ["/home/w/random"])


@check(Capability.SNAPSHOT_FULL)
def kept_whole(make: MakeBox) -> None:
    """A machine that was kept goes on with its processes, as often as one wants, each time as another."""
    with make() as box:
        text = "while sleep 0.05; do echo . >> /tmp/ticks; done"
        box.run(f"({text}) > /dev/null 2>&1 & echo $! > /tmp/pid; echo kept > /home/f")
        reference = box.snapshot(kind="full")
        box.run("echo later > /home/f; kill $(cat /tmp/pid)")
    with make(from_=reference) as first, make(from_=reference) as second:
        for again in (first, second):
            equal(
                again.run("cat /home/f; kill -0 $(cat /tmp/pid) && echo runs").stdout,
                "kept\nruns\n",
            )
            equal(again.run("hostname").stdout.strip(), again.id)
        texts = {
            b.run("head -c 16 /dev/urandom | od; cat /etc/machine-id").stdout
            for b in (first, second)
        }
        equal(len(texts), 2, "both are the same")
        ticks = "wc -l < /tmp/ticks"
        before = int(first.run(ticks).stdout)
        time.sleep(0.5)
        holds(int(first.run(ticks).stdout) > before, "its process does not go on")
        first.run("echo more >> /home/f")
        second_reference = first.snapshot(kind="full")
        equal(second.run("cat /home/f").stdout, "kept\n")
    with make(from_=second_reference) as last:
        equal(
            last.run("cat /home/f; kill -0 $(cat /tmp/pid) && echo runs").stdout,
            "kept\nmore\nruns\n",
        )


@check(Capability.SNAPSHOT_DISK)
def snapshots(make: MakeBox) -> None:
    """A snapshot is an image: with all that was changed and removed, of forks too, and it chains."""
    with make() as box:
        box.run(
            "mkdir /data; echo one > /data/f; rm -f /etc/group; ln -s f /data/l; chmod 640 /data/f"
        )
        [child] = box.fork()
        child.run("echo two > /data/g; echo more >> /data/f")
        reference = child.snapshot()
        equal(child.snapshot(), reference, "nothing has changed since")
        child.kill()
    with make(from_=reference) as again:
        look = "cat /data/f /data/g /data/l; test -e /etc/group || echo removed; stat -c %a /data/f"
        equal(again.run(look).stdout, "one\nmore\ntwo\none\nmore\nremoved\n640\n")
        again.run("rm -r /data; mkdir /data; echo three > /data/h")
        second = again.snapshot()
    with make(from_=second) as last:
        equal(last.run("ls /data; cat /data/h").stdout, "h\nthree\n")
