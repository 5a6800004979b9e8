"""`python`: programs in the box."""

import json

from hadal.chat import ToolCall
from hadal.tools import PythonTool, Toolbox


def run(in_box, *programs, **settings):
    async def whole(box):
        toolbox = Toolbox([PythonTool(box, **settings)])
        calls = [ToolCall("python", json.dumps({"code": code})) for code in programs]
        return [(await toolbox.call(call, f"call-{at}")).text for at, call in enumerate(calls)]

    return in_box(whole)


def test_programs(in_box):
    found = run(
        in_box,
        "print(6 * 7)",
        "import sys; print('a', flush=True); print('b', file=sys.stderr)",
        "x = 1",
        "print(x)",
        "if __name__ == '__main__': print('ü' * 3)",
        "open('/tmp/f', 'w').write('kept')",
        "print(open('/tmp/f').read())",
        "raise SystemExit(3)",
        "#" + "x" * 200_000 + "\nprint('long')",
    )
    assert found[:3] == ["42\n", "a\nb\n", "(no output)"]
    assert "NameError: name 'x' is not defined" in found[3]
    assert found[3].endswith("[exit code 1]")
    assert found[4:] == ["üüü\n", "(no output)", "kept\n", "[exit code 3]", "long\n"]


def test_limits(in_box):
    [late] = run(in_box, "import time; print('begun', flush=True); time.sleep(60)", timeout_s=0.5)
    assert late == "begun\n[killed after 0.5 s]"
    [missing] = run(in_box, "print(1)", program="python9")
    assert missing.startswith("Error: python9 was not started")
