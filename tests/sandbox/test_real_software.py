"""Real software in a Debian made by debootstrap: it runs in a box as it runs on a host."""

import asyncio
import shutil
import time
import xml.etree.ElementTree as ElementTree

import pytest

from hadal.node.images import ImageStore, default_folder
from hadal.node.images.tree import remove_tree
from hadal.sandbox import ContainerSpec, NetworkPolicy, Sandbox
from tests.sandbox.conftest import needs_root
from tests.sandbox.debian_lab import debootstrap, find_mirrors, run_in_chroot
from tests.sandbox.network_lab import needs_network

pytestmark = [needs_root, needs_network, pytest.mark.slow, pytest.mark.timeout(1500)]

PACKAGES = (
    "git gcc make libc6-dev python3-dev python3-venv python3-pip"
    " adduser sudo netbase procps iputils-ping"
)
SETUP = f"""
    set -e; export DEBIAN_FRONTEND=noninteractive; apt-get update
    suite=$(apt-cache search --names-only '^libpython3[.][0-9]+-testsuite$' | cut -d' ' -f1)
    apt-get install -y --no-install-recommends {PACKAGES} $suite
    adduser --disabled-password --gecos '' ada
"""
OF_ROOT = (
    "test_os test_posix test_subprocess test_socket test_pty test_tempfile test_shutil test_tarfile"
    " test_pathlib test_resource test_mmap test_fcntl"
)
OF_A_USER = (
    f"{OF_ROOT} test_signal test_threading test_fork1 test_multiprocessing_fork test_asyncio"
    " test_select test_epoll test_faulthandler"
)
"""Of CPython's own tests those that ask most of a system; those of root where root makes a difference."""
DIFFERENT = {
    "test_posix.PosixTester": "test_chown test_fchown test_lchown",  # an id that a box has not
    "test_socket.GeneralModuleTests": "test_sethostname",
    "test_shutil.TestCopy": "test_copy2_xattr test_copyxattr test_copyxattr_symlinks",  # trusted.*
}
"""What root cannot do in a box, for a reason (docs/debian.md)."""


@pytest.fixture(scope="module")
def mirrors():
    return find_mirrors()


@pytest.fixture(scope="module")
def root(mirrors, tmp_path_factory):
    """The tree that debootstrap makes, which is imported as the image `debian` and used for chroots."""
    folder = tmp_path_factory.mktemp("debian") / "root"
    debootstrap(mirrors, folder)
    yield folder
    remove_tree(folder)  # it is large, and pytest keeps the folders of three runs


@pytest.fixture(scope="module")
def node(root, tmp_path_factory):
    home = tmp_path_factory.mktemp("h")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(home))

        async def add():
            store = ImageStore(default_folder())
            await store.import_directory(root, "debian")
            await store.close()

        asyncio.run(add())
        yield home
    assert "Traceback" not in (home / "node/node.log").read_text()


def make(**changes):
    wanted = {"memory_mb": 2048, "cpus": 2, "disk_mb": 4096} | changes
    return Sandbox.create(ContainerSpec(**wanted))


@pytest.fixture(scope="module")
def box(node, mirrors):
    """A box with all the packages, and an ordinary user."""
    environment = {"DEBIAN_FRONTEND": "noninteractive", "LANG": "C.UTF-8"} | mirrors.pip
    with make(image="debian", network=mirrors.policy, env=environment) as box:
        if mirrors.certificates is not None:
            box.files.write("/usr/local/share/mirrors.pem", mirrors.certificates)
        assert "Setting up git" in shell(box, SETUP)
        yield box


@pytest.fixture(scope="module")
def snapshot(box):
    return box.snapshot()


def home_of(user):
    return "/root" if user is None else f"/home/{user}"


def shell(box, text, user=None):
    """Run a line of bash as a login shell does; return what it says."""
    home = home_of(user)
    result = box.run(
        ["/bin/bash", "-euc", text],
        user=user,
        cwd=home,
        env={"HOME": home, "USER": user or "root"},
        timeout_s=500,
    )
    assert result.exit_code == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_packages_come_and_go(box):
    assert shell(box, "dpkg --audit; dpkg --verify") == ""
    states = shell(box, "dpkg-query -W -f '${db:Status-Abbrev}\\n' | sort -u").split()
    assert states == ["ii"]
    shell(box, "apt-get check; make --version")
    shell(box, "apt-get purge -y make; ! command -v make")
    assert "0 to remove" in shell(box, "apt-get autoremove -y")
    # At a terminal dpkg gets one of its own.
    terminal = box.spawn("apt-get install -y make", tty=(24, 80))
    said = b"".join(data for _, data in terminal).decode()
    assert terminal.wait().exit_code == 0, said
    assert "Setting up make" in said
    shell(box, "make --version; apt-get install -y --reinstall bash coreutils; apt-get clean")
    assert shell(box, "dpkg --audit; dpkg --verify") == ""


def test_users(box):
    text = (
        "adduser --disabled-password --gecos '' bob; usermod -aG staff bob; echo bob:x | chpasswd"
    )
    shell(box, text)
    assert shell(box, "id -nG bob").split() == ["bob", "staff", "users"]
    shell(box, "echo secret > /srv/secret; chmod 600 /srv/secret")
    for become in ("su - bob -c", "runuser -u bob -- sh -c", "sudo -u bob sh -c"):
        assert shell(box, f"{become} 'id -un; ! cat /srv/secret'") == "bob\n"
    assert shell(box, "su - bob -c 'pwd; echo $HOME'") == "/home/bob\n/home/bob\n"
    shell(box, "deluser --remove-home bob; ! id bob; test ! -e /home/bob")
    # Nobody gains privileges in a box; whoever drives it says `user="root"` instead.
    refused = box.run("sudo -n id", user="ada")
    assert refused.exit_code != 0
    assert "no new privileges" in refused.stderr


@pytest.mark.parametrize("user", [None, "ada"])
def test_git(box, user):
    shell(
        box,
        """
        rm -rf work clone bare.git; mkdir work; cd work
        git init -q -b main; git config --global user.name A; git config --global user.email a@b
        printf '#!/bin/sh\\necho ran\\n' > run; chmod +x run; ln -s run link
        mkdir deep; ln -s ../run deep/up; ln -s /nowhere dangling
        printf '#!/bin/sh\\necho hook > hooked\\n' > .git/hooks/pre-commit
        chmod +x .git/hooks/pre-commit; git add -A; git commit -qm one; test -e hooked
        cd ..; git clone -q file://$PWD/work clone; git clone -q --bare work bare.git
        cd clone; test -z "$(git status --porcelain)"; test "$(./link)" = ran; test -L dangling
        test "$(deep/up)" = ran; test ! -x .git/hooks/pre-commit
        git checkout -q -b topic; echo more >> run; git commit -qam two; git push -q ../bare.git topic
        git -C ../bare.git fsck --full --strict; git gc -q; git worktree add -q ../tree main
        git stash list; git mv run ran; git reset -q --hard; test -z "$(git status --porcelain)"
        cd ..; rm -rf work clone tree bare.git
        """,
        user=user,
    )


SOURCES = {
    "count.c": """
        #include <pthread.h>
        #include <stdatomic.h>
        static atomic_int n;
        static void *add(void *arg) { for (int i = 0; i < 100000; i++) n++; return arg; }
        int count(void)
        {
            pthread_t t[16];
            for (int i = 0; i < 16; i++) if (pthread_create(t + i, 0, add, 0)) return -1;
            for (int i = 0; i < 16; i++) pthread_join(t[i], 0);
            return n;
        }""",
    "main.c": """
        #include <stdio.h>
        int count(void);
        int main(void) { printf("%d\\n", count()); return 0; }""",
    "Makefile": (
        "all: shared static checked\n"
        "libcount.so: count.c\n\tgcc -O2 -Wall -shared -fPIC -o $@ $< -pthread\n"
        "shared: main.c libcount.so\n\tgcc -o $@ main.c -L. -lcount -Wl,-rpath,.\n"
        "static: main.c count.c\n\tgcc -static -o $@ $^ -pthread\n"
        "checked: main.c count.c\n\tgcc -g -fsanitize=address,undefined -o $@ $^ -pthread\n"
    ),
}


@pytest.mark.parametrize("user", [None, "ada"])
def test_gcc_and_make(box, user):
    folder = f"{home_of(user)}/c"
    for name, text in SOURCES.items():
        box.files.write(f"{folder}/{name}", text, parents=True, user=user)
    shell(box, f"cd {folder}; make -j4; make -q", user=user)
    for program in ("shared", "static", "checked"):
        assert shell(box, f"cd {folder}; ./{program}", user=user) == "1600000\n"


def test_pip(box, mirrors):
    """A pure wheel, a binary one, a package compiled here, and the tests that came with it."""
    trusted = "export PIP_CERT=/usr/local/share/mirrors.pem;" if mirrors.certificates else ""
    shell(
        box,
        f"""
        {trusted} python3 -m venv venv; venv/bin/pip install -q attrs pytest numpy
        venv/bin/python -c 'import attr, numpy as n; assert (n.eye(3) @ n.eye(3)).trace() == 3'
        venv/bin/pip download -q --no-deps --no-binary markupsafe markupsafe
        tar xf [Mm]arkup[Ss]afe-*.tar.gz; cd [Mm]arkup[Ss]afe-*/; ../venv/bin/pip install -q .
        ls ../venv/lib/python3*/site-packages/markupsafe/_speedups*.so
        ../venv/bin/python -m pytest -q tests; ../venv/bin/pip check
        """,
        user="ada",
    )


@pytest.mark.parametrize("limits", ["none", "deny", "debian"])
def test_what_is_not_allowed_is_refused_at_once(snapshot, mirrors, limits):
    policies = {"none": NetworkPolicy.none(), "deny": NetworkPolicy()}
    policy = policies.get(limits, mirrors.debian_only)
    with make(from_=snapshot, network=policy) as other:
        began = time.monotonic()
        apt = other.run("apt-get update")
        if limits == "debian":
            assert apt.exit_code == 0, apt.stderr
        else:
            assert "Temporary failure resolving" in apt.stderr + apt.stdout
            assert other.run("apt-get install -y less").exit_code != 0
        pip = other.run("python3 -m pip --retries 1 download attrs")
        assert pip.exit_code != 0
        assert "Temporary failure in name resolution" in pip.stderr + pip.stdout
        assert time.monotonic() - began < 30


def passed(text):
    """Return the names of the tests that passed: neither failed nor were skipped."""
    cases = ElementTree.fromstring(text).iter("testcase")
    bad = ("error", "failure", "skipped")
    return {c.get("name") for c in cases if all(c.find(kind) is None for kind in bad)}


@pytest.mark.long
@pytest.mark.parametrize(("user", "tests"), [("root", OF_ROOT), ("ada", OF_A_USER)])
def test_tests_of_python_end_as_in_a_chroot(snapshot, root, user, tests):
    where = f"/tmp/suite-{user}"
    text = (
        f"mkdir {where} && cd {where} && python3 -m test -j4 --timeout 240"
        # Virtual machines often have sockets to their host that lead nowhere: these tests hang there.
        f" --ignore '*VSOCK*' --junit-xml {where}/out.xml {tests}"
    )
    with make(from_=snapshot, env={"LANG": "C.UTF-8"}) as other:
        ran = other.run(text, user=user, timeout_s=600, env={"HOME": "/tmp"})
        in_box = passed(other.files.read_text(f"{where}/out.xml"))
    if not (root / "home/ada").exists():
        for name in ("resolv.conf", "hosts"):  # as every box gets them
            shutil.copy(f"/etc/{name}", root / "etc" / name)
        done = run_in_chroot(root, SETUP, network=True)
        assert done.returncode == 0, done.stderr[-3000:]
    run_in_chroot(root, text, user=user)
    in_chroot = passed((root / where[1:] / "out.xml").read_text())
    assert len(in_chroot) > 1000, "a part of the tests did not run"
    different = {f"test.{where}.{n}" for where, names in DIFFERENT.items() for n in names.split()}
    expected = different if user == "root" else set()
    assert in_chroot - in_box == expected, ran.stdout[-5000:]
