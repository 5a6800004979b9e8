"""An encoding with a small tokenizer."""

import pytest

from hadal.encoding import Encoding
from hadal.train.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["I count the lines of a.txt. That is done."] * 3, 320, path)
    return path


@pytest.fixture(scope="session")
def encoding(tokenizer_path):
    return Encoding.load("v4", tokenizer=tokenizer_path)
