"""Recipes, with real boxes for their commands."""

import asyncio
import os
import socket

import pytest

from hadal.errors import ConfigError, ImageError
from hadal.node.build_boxes import BuildBoxes
from hadal.node.images import Recipe, Step
from tests.sandbox.conftest import names, needs_root

pytestmark = needs_root


def build(store, recipe, **options):
    """Build `made`; return the record, the steps that were known, and the output."""
    known, shown = [], []

    async def main():
        async with BuildBoxes.open(shown.append, **options) as boxes:
            return await store.build(
                recipe, boxes.run, "made", on_step=lambda step, was: known.append(was)
            )

    return asyncio.run(main()), known, b"".join(shown)


RECIPE = """
base = "host"

[[step]]
environment = { GREETING = "hello" }
working_directory = "/tmp"

[[step]]
copy = "app"
to = "/opt/app"

[[step]]
run = "cat /opt/app/data > /opt/result; echo $GREETING >> /opt/result; pwd >> /opt/result; rm -rf /srv"

[[step]]
run = "seq 1 100000; touch /opt/last"

[[step]]
command = ["cat", "/opt/result"]
user = "1000"
"""


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipe"
    (folder / "app").mkdir(parents=True)
    (folder / "app/data").write_text("data\n")
    os.chown(folder / "app/data", 1234, 1234)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def test_a_recipe_and_what_is_known_of_it(store, recipe, merged, with_box):
    record, known, shown = build(store, Recipe.load(recipe))
    assert known == [True, False, False, False, True]
    assert shown == "".join(f"{i}\n" for i in range(1, 100001)).encode()
    assert len(record.layers) == 4
    assert [bind.target for bind in record.binds][:1] == ["/usr"]
    assert record.config.environment == {"GREETING": "hello"}
    assert (record.config.command, record.config.user) == (("cat", "/opt/result"), "1000")
    again, known, shown = build(store, Recipe.load(recipe))
    assert (again, known, shown) == (record, [True, False, True, True, True], b"")
    (recipe.parent / "app/data").write_text("other\n")
    changed, known, _ = build(store, Recipe.load(recipe))
    assert known == [True, False, False, False, True]
    assert changed.layers != record.layers

    image = asyncio.run(store.acquire("made"))
    root = merged(image)
    assert (root / "opt/result").read_text() == "other\nhello\n/tmp\n"
    assert (root / "opt/app/data").stat().st_uid == 0
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert not (root / "srv").exists()

    async def body(box):
        _, out, _ = await box.run(
            *image.config.command,
            environment=image.config.environment,
            directory=image.config.working_directory.encode(),
            user=image.config.user,
        )
        assert out == b"other\nhello\n/tmp\n"

    with_box(body, layers=image.layers, binds=image.binds)
    asyncio.run(store.release(image))


def test_layers_of_steps_go_when_no_image_has_them(store, recipe):
    build(store, Recipe.load(recipe))

    async def clean():
        for name in ("made", "host"):
            await store.remove(name)
        return await store.prune()

    assert asyncio.run(clean()) > 0
    for folder in ("layers", "steps", "mounts", "staging"):
        assert names(store.root / folder) == []
    assert build(store, Recipe.load(recipe))[1] == [True, False, False, False, True]


def test_a_command_that_fails_ends_the_build(store, tmp_path):
    steps = (Step(run="touch /opt/first"), Step(run="echo to see >&2; exit 7"), Step(run="true"))
    with pytest.raises(ImageError, match="ended with status 7\nto see"):
        build(store, Recipe(base="host", steps=steps))
    assert [record.name for record in asyncio.run(store.list())] == ["host"]


def test_the_network_of_the_host_is_there_when_asked_for(store):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        code = f'import socket; socket.create_connection((\\"127.0.0.1\\", {port}))'
        recipe = Recipe(base="host", steps=(Step(run=f'python3 -c "{code}"'),))
        with pytest.raises(ImageError, match="ended with status 1"):
            build(store, recipe)
        record, *_ = build(store, recipe, host_network=True)

    async def look():
        async with store.using("made") as image:
            return sorted(p.name for p in (image.layers[0] / "etc").glob("*"))

    assert record.layers
    assert asyncio.run(look()) == []


@pytest.mark.parametrize(
    ("copy", "to", "message"),
    [
        ("../outside", "/x", "is not below"),
        ("/etc/passwd", "/x", "is not below"),
        ("link", "/x", "is not below"),
        ("none", "/x", "No such file"),
        ("app", "x", "expected a path"),
        ("app", "/", "expected a path"),
        ("app", "/a/../b", "expected a path"),
        ("app", "/usr/share/x", "/usr is that of the host"),
        ("app", "/bin/x", "it is a link in the image"),
        ("fifo", "/x", "expected a file or directory"),
    ],
)
def test_copies_that_cannot_be(open_store, recipe, copy, to, message):
    store = open_store(erofs=False)
    (recipe.parent.parent / "outside").touch()
    (recipe.parent / "link").symlink_to("/etc")
    os.mkfifo(recipe.parent / "fifo")
    steps = (Step(copy_from=copy, to=to),)
    with pytest.raises(ImageError, match=message):
        build(store, Recipe(base="host", steps=steps, directory=recipe.parent))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "base"),
        ("base = 1", "base"),
        ("base = 'a'\n[[step]]\n", "either `run`"),
        ("base = 'a'\n[[step]]\nrun = 'a'\ncopy = 'b'\nto = '/b'", "either `run`"),
        ("base = 'a'\n[[step]]\ncopy = 'b'", "belong together"),
        ("base = 'a'\n[[step]]\nrum = 'a'", "step.0.rum"),
        ("base = 'a", "recipe.toml"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Recipe.load(tmp_path / "recipe.toml")
