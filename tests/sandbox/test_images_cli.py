"""`hadal image`, as a user types it."""

import asyncio
import base64
import json
import threading

import pytest

from hadal.cli.main import app
from hadal.errors import ConfigError, ImageError
from hadal.node.images.credentials import read_credentials
from tests.sandbox.conftest import names, needs_root
from tests.sandbox.image_files import small_image
from tests.sandbox.registry_server import RegistryServer

pytestmark = needs_root


@pytest.fixture
def hadal(open_store, monkeypatch, capfd, tmp_path):
    """Run a command line; return what it writes to standard output."""
    monkeypatch.setenv("HADAL_IMAGES", str(open_store(tmp_path / "store").root))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))

    def run(*arguments):
        app(["image", *map(str, arguments)], exit_on_error=False, result_action="return_value")
        return capfd.readouterr().out

    return run


@pytest.fixture
def registry():
    """A registry in a thread of its own."""
    server = RegistryServer()
    started, ended = threading.Event(), asyncio.Event()

    async def serve():
        async with server.running():
            server.loop = asyncio.get_running_loop()
            started.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    yield server
    server.loop.call_soon_threadsafe(ended.set)
    thread.join()


def test_from_pull_to_prune(hadal, registry, tmp_path):
    image = small_image()
    registry.add(image)
    registry.basic = ("user", "secret")
    (tmp_path / "docker").mkdir()
    auth = base64.b64encode(b"user:secret").decode()
    logins = {"auths": {registry.host: {"auth": auth}, "https://index.docker.io/v1/": {}}}
    (tmp_path / "docker/config.json").write_text(json.dumps(logins))
    name = f"{registry.host}/library/tool:1"
    assert f"{name}: 2 layers" in hadal("pull", name)
    archive = tmp_path / "archive"
    archive.write_bytes(image.docker_save())
    made = json.loads(hadal("import", archive, "mine", "--json"))
    assert made["layers"] == list(reversed(image.diff_ids))
    hadal("import", image.write_layout(tmp_path / "layout"))
    (tmp_path / "recipe.toml").write_text('base = "mine"\n[[step]]\nuser = "5"\n')
    built = json.loads(hadal("build", tmp_path / "recipe.toml", "built", "--json"))
    assert built["config"]["user"] == "5"
    for left in ("mounts", "staging"):
        assert names(tmp_path / "store" / left) == []
    listed = [json.loads(line)["name"] for line in hadal("ls", "--json").splitlines()]
    assert listed == sorted([name, "mine", "docker.io/team/tool:1", "built"])
    assert "mine" in hadal("ls")
    hadal("rm", *listed)
    assert json.loads(hadal("prune", "--json"))["freed_bytes"] > 0
    assert hadal("ls", "--json") == ""


def test_what_cannot_be(hadal, tmp_path):
    with pytest.raises(ConfigError, match="is a plain directory"):
        hadal("import", tmp_path)
    with pytest.raises(ConfigError, match="expected REGISTRY=URL"):
        hadal("pull", "a", "--mirror", "docker.io")
    with pytest.raises(ImageError, match="no image 'none'"):
        hadal("rm", "none")
    with pytest.raises(ImageError, match="No such file"):
        hadal("import", tmp_path / "none")


@pytest.mark.parametrize(
    ("auth", "message"), [("%%%", "cannot be read"), ("bm9jb2xvbg==", "no password")]
)
def test_logins_that_cannot_be_read(tmp_path, auth, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"h.example": {"auth": auth}}}))
    with pytest.raises(ImageError, match=message):
        read_credentials(path)


def test_logins(tmp_path):
    assert read_credentials(tmp_path / "none") == {}
    auth = base64.b64encode(b"u:p:w").decode()
    hosts = ("https://index.docker.io/v1/", "http://h.example:5000", "other.example")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {host: {"auth": auth} for host in hosts}, "x": 1}))
    assert read_credentials(path) == dict.fromkeys(
        ("docker.io", "h.example:5000", "other.example"), ("u", "p:w")
    )
