"""The tree is complete, pickles, and reads well."""

import pickle

import pytest

from hadal import errors
from hadal.errors import CheckpointMismatchError, ContextLengthError, HadalError

INSTANCES = [
    errors.ConfigError("a", hint="b"),
    errors.InputError("a"),
    errors.EncodingError("a"),
    errors.InvalidConversationError("a", where="messages[0]", hint="b"),
    errors.MalformedCompletionError("a", offset=3, text="x" * 300),
    errors.CheckpointError("a", hint="b"),
    CheckpointMismatchError("checkpoint x", missing=["m"], unexpected=["u"], mismatched=["s"]),
    errors.StorageError("a", hint="b"),
    errors.EngineError("a"),
    errors.CapacityError("a"),
    errors.UpstreamError("a"),
    errors.UpstreamRefusedError("a"),
    ContextLengthError(limit=10, actual=12, hint="h"),
    errors.SandboxError("a"),
    errors.LaunchError("a", hint="b"),
    errors.SandboxGoneError("a", cause=errors.GoneCause.OOM, hint="b"),
    errors.NoCapacityError("a"),
    errors.UnsupportedError("a", hint="b"),
    errors.CommandRefusedError("a", errno=2),
    errors.CommandFailedError("a", result=[1]),
    errors.CallFailedError("a", result=[1]),
    errors.SandboxFileError(2, "/a", hint="b"),
    errors.UnsafeFileError("a"),
    errors.ImageError("a"),
    errors.NodeError("a"),
    errors.NodeAuthError("a", hint="b"),
    errors.UnknownOutcomeError("a", hint="b"),
    errors.ReplayDivergedError(position=1, recorded="a", asked="b", hint="c"),
    errors.JournalError("a"),
]


def test_every_class_has_an_instance_here():
    classes = {getattr(errors, n) for n in errors.__all__} - {HadalError, errors.GoneCause}
    assert {type(e) for e in INSTANCES} == classes


@pytest.mark.parametrize("error", INSTANCES, ids=lambda e: type(e).__name__)
def test_pickles(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)


def test_codes_are_unique_and_in_the_docstring():
    codes = [type(e).code for e in INSTANCES]
    assert len(set(codes)) == len(codes)
    for error in INSTANCES:
        assert type(error).__name__ in (errors.__doc__ or "")


def test_messages():
    assert str(INSTANCES[0]) == "a\nhint: b"
    assert str(ContextLengthError(limit=1000, actual=1200)) == (
        "context too long: expected at most 1,000 tokens, got 1,200"
    )
    text = str(INSTANCES[6])
    assert "1 missing:\n  m" in text
    assert "1 unexpected:\n  u" in text
    assert "1 of another shape or dtype:\n  s" in text
