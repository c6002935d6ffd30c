"""Callers of the guest kernel's functions, for gdb: the kernel has neither frame pointers nor unwind tables.

As the kernel's own unwinder does (CONFIG_UNWINDER_GUESS), the stack is searched for return addresses. One of a direct call
of the very function that is left is its caller's. Where there is none (a call through a pointer, a jump to a function in
place of a call) it is the first that a call may have left, which can be stale.
"""
import re
import struct

import gdb
from gdb.unwinder import Unwinder, register_unwinder

TEXT = 0xFFFFFFFF81000000, 0xFFFFFFFFC0000000
# Words of the stack that are looked at: 4 KiB.
WORDS = 512


def function(pc):
    """Where the function that pc is in begins."""
    found = re.match(r"(\S+)(?: \+ (\d+))? in section", gdb.execute(f"info symbol {pc:#x}", to_string=True))
    return pc - int(found[2] or 0) if found else None


def called(pc):
    """What the call before pc called: an address, True if that is not in the code, None if there is no call."""
    try:
        code = gdb.selected_inferior().read_memory(pc - 7, 7).tobytes()
    except gdb.MemoryError:
        return None
    if code[2] == 0xE8:
        return (pc + struct.unpack("<i", code[3:])[0]) & 0xFFFFFFFFFFFFFFFF
    # call *register, call *displacement(register): opcode FF, /2.
    near = [code[at + 1] for at in (1, 4, 5) if code[at] == 0xFF]
    return True if any(modrm >> 3 & 7 == 2 for modrm in near) else None


class Frame:
    """What a frame is told by: the stack above it and its function."""

    def __init__(self, sp, pc):
        self.sp, self.pc = sp, pc


class Callers(Unwinder):
    def __init__(self):
        super().__init__("brig-guest-kernel")

    def __call__(self, frame):
        pc = int(frame.read_register("rip")) & 0xFFFFFFFFFFFFFFFF
        if not TEXT[0] <= pc < TEXT[1]:
            return None
        sp = int(frame.read_register("rsp")) & 0xFFFFFFFFFFFFFFFF
        start = function(pc)
        stack = b""
        # The end of a stack may be nearer.
        for size in (8 * WORDS, 0x1000 - sp % 0x1000):
            try:
                stack = gdb.selected_inferior().read_memory(sp, size).tobytes()
                break
            except gdb.MemoryError:
                continue
        likely = None
        for at, (word,) in enumerate(struct.iter_unpack("<Q", stack[: len(stack) // 8 * 8])):
            if not TEXT[0] <= word < TEXT[1]:
                continue
            target = called(word)
            if target == start:
                likely = at, word
                break
            if target is not None and likely is None:
                likely = at, word
        if likely is None:
            return None
        at, word = likely
        registers = frame.read_register("rip").type, frame.read_register("rsp").type
        above = sp + 8 * (at + 1)
        told = frame.create_unwind_info(Frame(gdb.Value(above).cast(registers[1]), gdb.Value(start or pc).cast(registers[0])))
        told.add_saved_register("rip", gdb.Value(word).cast(registers[0]))
        told.add_saved_register("rsp", gdb.Value(above).cast(registers[1]))
        return told


register_unwinder(None, Callers(), replace=True)
