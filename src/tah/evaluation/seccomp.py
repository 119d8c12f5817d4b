"""The system calls that programs in the sandbox may not make, as a filter for the kernel."""

from __future__ import annotations

import errno
import struct

# System calls refused, as (x86-64, AArch64): those that make name spaces and mounts, look into other processes, or take
# memory that no limit counts. The namespace flags of clone and the families of socket are looked at one by one.
REFUSED = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "fsopen": (430, 430), "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
}  # fmt: skip
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
NAMESPACES = 0x7E020000  # CLONE_NEWNS | CGROUP | UTS | IPC | USER | PID | NET
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: the others, such as AF_VSOCK, do not end at a network name space
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def system_call_filter(machine: str) -> bytes:
    """The refusals above as a classic BPF program for `bwrap --seccomp`; `machine` as the kernel calls it."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 calls of x86-64
    for numbers in REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.EPERM)]
    program += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | errno.ENOSYS)]  # libraries then use clone
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, NAMESPACES)]
    program += [(give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow)]
    program += [(equal, 0, len(FAMILIES) + 2, SOCKET[column]), (load, 0, 0, 16)]
    program += [(equal, len(FAMILIES) - at, 0, family) for at, family in enumerate(FAMILIES)]
    program += [(give, 0, 0, refuse | errno.EAFNOSUPPORT), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
