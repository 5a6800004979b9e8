"""A node of the run's own, and an encoding with a small tokenizer."""

import os

import pytest

from hadal.encoding import Encoding
from hadal.train.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A node that the first box starts; ends by itself when the tests are over."""
    if os.geteuid() != 0:
        pytest.skip("boxes are made by root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HADAL_HOME", str(tmp_path_factory.mktemp("hadal")))
        yield


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["I count the lines of a.txt. That is done."] * 3, 320, path)
    return path


@pytest.fixture(scope="session")
def encoding(tokenizer_path):
    return Encoding.load("v4", tokenizer=tokenizer_path)
