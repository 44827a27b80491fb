# SPDX-License-Identifier: Apache-2.0
"""Give up rights, then run a program: `python -I confine.py FOLDER MEMORY CPU_S`.

Runs FOLDER/program.py with FOLDER as the only place where files can be made or changed.
Started by `sandbox.py` inside fresh namespaces. It stands alone: nothing of this
package can be imported with `-I`.
"""

import ctypes
import os
import resource
import sys

# <linux/landlock.h>; the numbers are the same on every architecture
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH, VERSION_FLAG = 1, 1
# every right that changes the file system, by the ABI that brought it
WRITE_FILE, REMOVE_DIR, REMOVE_FILE = 1 << 1, 1 << 4, 1 << 5
MAKE = sum(1 << bit for bit in range(6, 13))  # char, dir, reg, sock, fifo, block, sym
REFER, TRUNCATE = 1 << 13, 1 << 14  # ABI 2, ABI 3
SCOPE_SOCKETS_AND_SIGNALS = 0b11  # ABI 6
PR_SET_NO_NEW_PRIVS = 38
LEAST_ABI = 3  # before it, files could be cut off (truncate)

FILE_BYTES = 16 * 2**20  # of one file the program writes
PROCESSES = 64

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [
        ("fs", ctypes.c_uint64),
        ("net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr, packed."""

    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def check(result: int, what: str) -> int:
    """Return a system call's result.

    Raises:
        OSError: it failed.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def forbid_writes_outside(folder: str) -> None:
    """Let this process and its children change files only beneath a folder.

    Raises:
        OSError: the kernel cannot (Linux 6.2 with Landlock is needed).
    """
    abi = libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG)
    if check(abi, "Landlock") < LEAST_ABI:
        raise OSError(f"Landlock ABI {abi} is older than {LEAST_ABI} (Linux 6.2)")
    rights = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE | REFER | TRUNCATE
    scoped = SCOPE_SOCKETS_AND_SIGNALS if abi >= 6 else 0
    ruleset = Ruleset(rights, 0, scoped)
    size = ctypes.sizeof(ruleset) if abi >= 6 else ctypes.sizeof(ctypes.c_uint64)
    made = libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    rules = check(made, "Landlock ruleset")
    rule = PathBeneath(rights, os.open(folder, os.O_PATH | os.O_CLOEXEC))
    added = libc.syscall(ADD_RULE, rules, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    check(added, "Landlock rule")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    check(libc.syscall(RESTRICT_SELF, rules, 0), "Landlock")


def main(folder: str, memory: str, cpu_s: str) -> None:
    """Confine this process, then become the program."""
    for what, most in (
        (resource.RLIMIT_AS, int(memory)),
        (resource.RLIMIT_CPU, int(cpu_s)),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    forbid_writes_outside(folder)
    os.chdir(folder)
    print("confined", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, "-I", "-B", "program.py"])


if __name__ == "__main__":
    main(*sys.argv[1:])
