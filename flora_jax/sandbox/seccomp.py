"""A filter of system calls that no limit of the sandbox binds, as a BPF program.

Memory behind a file descriptor or a System V identifier (a socket's buffers, too) belongs to no
process, so that neither an address-space limit nor a look at the processes sees it; a socket may reach a
virtual machine's host, which no network namespace hides; and calls that a program for a test never needs
are so many doors less. Knows nothing of bubblewrap, which loads the program.
"""

from __future__ import annotations

import platform
import struct

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_ENOSYS = 38  # What an old kernel says: libraries then take another way.
_NUMBER, _ARCHITECTURE = 0, 4  # Offsets in struct seccomp_data.
_X32 = 0x40000000  # The second table of numbers on x86-64.

# memfd_create memfd_secret shmget shmat msgget semget bpf userfaultfd perf_event_open
# io_uring_setup mount umount2 pivot_root chroot setns unshare ptrace process_vm_readv
# process_vm_writev add_key request_key keyctl kexec_load open_by_handle_at fsopen fsmount
# open_tree move_mount socket socketpair
_X86_64 = (319, 447, 29, 30, 68, 64, 321, 323, 298, 425, 165, 166, 155, 161, 308, 272, 101, 310,
           311, 248, 249, 250, 246, 304, 430, 432, 428, 429, 41, 53)  # fmt: skip
_AARCH64 = (279, 447, 194, 196, 186, 190, 280, 282, 241, 425, 40, 39, 41, 51, 268, 97, 117, 270,
            271, 217, 218, 219, 104, 265, 430, 432, 428, 429, 198, 199)  # fmt: skip
_TABLES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


def program(machine: str | None = None) -> bytes | None:
    """The filter for a ``machine`` (default this one), or ``None`` where no table is known."""
    known = _TABLES.get(machine or platform.machine())
    if known is None:
        return None
    architecture, numbers = known
    refuse = (_RETURN, 0, 0, _ERRNO | _ENOSYS)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),  # Numbers of a 32-bit program mean other calls.
        (_LOAD, 0, 0, _NUMBER),
        # Both jumps lead to the last line; the second number of a pair is how many are passed over.
        (_AT_LEAST, len(numbers) + 1, 0, _X32),
    ]
    for left, number in zip(range(len(numbers), 0, -1), sorted(numbers), strict=True):
        steps.append((_EQUAL, left, 0, number))
    steps += [(_RETURN, 0, 0, _ALLOW), refuse]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
