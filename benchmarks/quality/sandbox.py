# SPDX-License-Identifier: Apache-2.0
"""Run a generated program where it can do little harm.

In a subprocess with namespaces of its own (user, network, processes, IPC): it has no
network and sees no other process, and all it starts ends with it. Landlock lets it
change files in a temporary folder only; time, memory, file size and processes are
limited; the environment is empty. It can read what the user can read. This keeps out
accidents and common mischief; it is no defence against an attack on the kernel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

CONFINE = Path(__file__).with_name("confine.py")
NAMESPACES = (
    *("--user", "--map-root-user", "--net", "--ipc"),
    *("--pid", "--fork", "--kill-child"),
)
TIMEOUT_S = 10.0
MEMORY = 2**30  # bytes of address space
MARK = "program ended"  # the program's own last line: exit codes alone can be faked
KEPT = 2_000  # characters of output


@dataclass(frozen=True)
class Run:
    """What became of a program.

    Attributes:
        verdict: `passed` if it ran to its end, `failed` or `timeout`.
        output: The end of its standard error.
    """

    verdict: Literal["passed", "failed", "timeout"]
    output: str


class SandboxError(ValueError):
    """This machine cannot confine programs."""


def run_program(
    program: str, timeout_s: float = TIMEOUT_S, memory: int = MEMORY
) -> Run:
    """Run a Python program, confined.

    Args:
        program: Its text; it fails by an exception, or by not reaching its end.
        timeout_s: Wall-clock seconds; half as many again of processor time.
        memory: Bytes of address space.

    Raises:
        SandboxError: this machine's kernel or tools cannot confine it.
    """
    _check_machine()
    return _run(program, timeout_s, memory)


@cache
def _check_machine() -> None:
    """Refuse machines where the confinement does not start."""
    if shutil.which("unshare") is None:
        raise SandboxError("programs are run under unshare (util-linux), not found")
    ended = _run("pass", timeout_s=60.0, memory=MEMORY)
    if ended.verdict != "passed":
        raise SandboxError(
            "programs cannot be confined here (user namespaces and Landlock of Linux "
            f"6.2 are needed): {ended.output.strip()}"
        )


def _run(program: str, timeout_s: float, memory: int) -> Run:
    with tempfile.TemporaryDirectory(prefix="moe-tta-program-") as folder:
        ended = f"\nprint({MARK!r}, flush=True)\n"
        Path(folder, "program.py").write_text(program + ended, "utf-8")
        limits = (str(memory), str(int(1.5 * timeout_s) + 1))
        inner = (sys.executable, "-I", str(CONFINE), folder, *limits)
        output = Path(folder, "output")
        errors = Path(folder, "errors")
        with output.open("wb") as out, errors.open("wb") as err:
            try:
                done = subprocess.run(
                    ("unshare", *NAMESPACES, *inner),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=timeout_s,
                    env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
                    cwd=folder,
                )
            except subprocess.TimeoutExpired:
                return Run("timeout", _end(errors))
        reached = _end(output).rstrip().endswith(MARK)
        passed = done.returncode == 0 and reached
        return Run("passed" if passed else "failed", _end(errors))


def _end(path: Path) -> str:
    return path.read_bytes()[-KEPT:].decode("utf-8", "replace")
