# SPDX-License-Identifier: Apache-2.0
"""What generated programs can and cannot do."""

import os

import pytest

from benchmarks.quality import sandbox
from benchmarks.quality.sandbox import Run, SandboxError, run_program


@pytest.fixture(autouse=True)
def _confinable():
    try:
        run_program("pass", timeout_s=60.0)
    except SandboxError as err:
        pytest.skip(str(err))


@pytest.mark.parametrize(
    "program", ["assert 1 + 1 == 2", "open('here', 'w').write('x')", "import math"]
)
def test_passed(program):
    assert run_program(program).verdict == "passed"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import os; os._exit(0)", ""),  # says it is fine, but never came to its end
        ("raise SystemExit(0)", ""),
        ("x = bytearray(3 * 2**30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(20 * 2**20))", "File too large"),
        (
            "import socket; socket.create_connection(('127.0.0.1', 80), 2)",
            "Network is unreachable",
        ),
        (f"import os; os.rename({__file__!r}, 'gone')", "OSError|PermissionError"),
        (f"import os; os.truncate({__file__!r}, 0)", "PermissionError"),
        ("import os; os.mkdir('/tmp/moe-tta-escaped')", "PermissionError"),
        ("import os; assert os.environ.get('SECRET') is None", ""),
        ("import benchmarks", "ModuleNotFoundError"),
    ],
)
def test_failed(program, reason, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    if "SECRET" in program:
        assert run_program(program).verdict == "passed"
        return
    found = run_program(program)
    assert found.verdict == "failed"
    assert any(word in found.output for word in reason.split("|"))


def test_this_process_is_not_there():
    found = run_program(f"import os; os.kill({os.getpid()}, 0)")
    assert found.verdict == "failed"
    assert "ProcessLookupError" in found.output


def test_a_loop_is_ended():
    assert run_program("while True: pass", timeout_s=1.0).verdict == "timeout"


def test_children_end_with_the_program():
    mark = "moe-tta-child-that-must-not-stay"
    program = (
        "import subprocess, sys\n"
        "wait = 'import time; time.sleep(60)'\n"
        f"subprocess.Popen([sys.executable, '-c', wait, {mark!r}])"
    )
    assert run_program(program).verdict == "passed"
    running = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                running.append(file.read())
        except OSError:  # ended meanwhile
            continue
    assert not [line for line in running if mark.encode() in line]


def test_a_machine_that_cannot_confine_is_refused(monkeypatch):
    sandbox._check_machine.cache_clear()
    monkeypatch.setattr(sandbox, "_run", lambda *a, **k: Run("failed", "no Landlock\n"))
    try:
        with pytest.raises(SandboxError, match=r"Landlock of Linux 6\.2.*no Landlock$"):
            run_program("pass")
    finally:
        sandbox._check_machine.cache_clear()
