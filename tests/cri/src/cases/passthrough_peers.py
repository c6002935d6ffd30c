# Has an NVMe of the VM work out of the memory of a display beside it: its queues and its data are there and nowhere else, so
# it reads and writes the other device without the CPU. Run in a privileged container; prints the serial number that the NVMe
# has written there, or "unreached".
import ctypes
import glob
import mmap
import os
import struct
import time


def find(kind):
    for path in glob.glob("/sys/bus/pci/devices/*"):
        if open(path + "/class").read().startswith(kind):
            return path
    raise SystemExit("no device of class " + kind)


def bare(path, length):
    # Without its driver; decoding memory, and master of the bus.
    if os.path.exists(path + "/driver"):
        with open(path + "/driver/unbind", "w") as unbind:
            unbind.write(os.path.basename(path))
    os.pwrite(os.open(path + "/config", os.O_RDWR), b"\x06\x00", 4)
    return mmap.mmap(os.open(path + "/resource0", os.O_RDWR), length)


nvme, display = find("0x0108"), find("0x0380")
registers, memory = bare(nvme, 0x4000), bare(display, 0x100000)
place = int(open(display + "/resource").readline().split()[0], 16)


def word(at):
    return ctypes.c_uint32.from_buffer(registers, at)


def wait(ready):
    for _ in range(500):
        if word(0x1C).value & 1 == ready:
            return
        time.sleep(0.01)
    raise SystemExit("the NVMe does not become %d: %#x" % (ready, word(0x1C).value))


SUBMISSION, COMPLETION, DATA = 0, 0x1000, 0x2000
word(0x14).value = 0
wait(0)
memory[: DATA + 0x1000] = bytes(DATA + 0x1000)
# Identify the controller, into the data page.
command = struct.pack("<BBHIQQQQ", 0x06, 0, 7, 0, 0, 0, place + DATA, 0) + struct.pack("<IIIIII", 1, 0, 0, 0, 0, 0)
memory[SUBMISSION : SUBMISSION + 64] = command
word(0x24).value = 0x001F001F
for at, address in ((0x28, place + SUBMISSION), (0x30, place + COMPLETION)):
    word(at).value = address & 0xFFFFFFFF
    word(at + 4).value = address >> 32
word(0x14).value = 0x00460001
wait(1)
word(0x1000).value = 1
# An emulated node beside busy ones takes seconds.
for _ in range(1500):
    # The phase of the first completion.
    if memory[COMPLETION + 14] & 1:
        print(memory[DATA + 4 : DATA + 24].decode().strip())
        break
    time.sleep(0.01)
else:
    print("unreached")
word(0x14).value = 0
