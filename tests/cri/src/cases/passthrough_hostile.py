# What a guest's root does to an NVMe that its VM has: everything but what a driver does. Run in a privileged container;
# prints "survived" when the guest's own memory is what it was.
import ctypes
import glob
import mmap
import os
import random
import struct
import time

random.seed(int(os.environ["SEED"]))
device = [p for p in glob.glob("/sys/bus/pci/devices/*") if open(p + "/vendor").read().strip() == "0x1b36"][0]
if os.path.exists(device + "/driver"):
    with open(device + "/driver/unbind", "w") as unbind:
        unbind.write(os.path.basename(device))
config = os.open(device + "/config", os.O_RDWR)
canary = mmap.mmap(-1, 4 << 20)
canary.write(b"canary!!" * (len(canary) // 8))


def read(at, length):
    return os.pread(config, length, at)


def write(at, data):
    os.pwrite(config, data, at)


bar = read(0x10, 8)
write(4, b"\x06\x00")
registers = mmap.mmap(os.open(device + "/resource0", os.O_RDWR), 0x4000)


def word(at):
    return ctypes.c_uint32.from_buffer(registers, at)


def restore():
    write(4, b"\x00\x00")
    write(0x10, bar)
    write(4, b"\x06\x00")


def capability(wanted):
    at = read(0x34, 1)[0]
    while at:
        if read(at, 1)[0] == wanted:
            return at
        at = read(at + 1, 1)[0]
    raise SystemExit("no capability %#x" % wanted)


def wait(ready):
    for _ in range(200):
        if word(0x1C).value & 1 == ready:
            return
        time.sleep(0.01)


def dma(address):
    # The admin queues, and one command to be fetched from there.
    word(0x14).value = 0
    wait(0)
    word(0x24).value = 0x001F001F
    for at, value in ((0x28, address), (0x30, address + 0x1000)):
        word(at).value = value & 0xFFFFFFFF
        word(at + 4).value = value >> 32
    word(0x14).value = 0x00460001
    wait(1)
    word(0x1000).value = 1


# Its BAR over RAM, the mirror of configuration space, interrupt messages, itself, and out of the address space.
moves = [0, 0x100000, 0x8000000, 0xE0000000, 0xFEE00000, 0xFFFFF000, (1 << 40) - 0x4000, 1 << 45, 1 << 63]
moves += [struct.unpack("<Q", bar)[0] + offset for offset in (0x1000, 0x2000, 0x4000)]
for place in moves:
    write(0x10, struct.pack("<Q", place))
    write(0x10, b"\xff" * 8)
    write(0x10, struct.pack("<Q", place))
    word(0x1C).value
    registers[0:4096]
restore()

# Its table of interrupts, with messages to anywhere.
msix = capability(0x11)
for round in range(4):
    for entry in range(65):
        for part in range(3):
            word(0x2000 + entry * 16 + part * 4).value = random.choice([0, 0xFEE00000, 0x100000, random.getrandbits(32)])
        word(0x2000 + entry * 16 + 12).value = random.getrandbits(1)
        if entry % 8 == 0:
            write(msix + 3, bytes([random.choice([0x80, 0xC0, 0, 0xFF])]))
write(msix + 3, b"\x00")

# DMA to where the guest has no memory, with bus mastering taken away in flight.
for address in (0x40000000, 0xE0000000, 0xFEE00000, 0xFFFFF000, 1 << 38, (1 << 48) - 0x4000):
    dma(address)
    time.sleep(0.05)
    dma(address)
    write(4, b"\x02\x00")
    write(4, b"\x06\x00")

# Resets in flight, by the function's own register and by the kernel.
express = capability(0x10)
for round in range(3):
    dma(0x40000000)
    control = struct.unpack("<H", read(express + 8, 2))[0]
    write(express + 8, struct.pack("<H", control | 0x8000))
    time.sleep(0.2)
    restore()

for round in range(400):
    write(random.randrange(256), bytes(random.getrandbits(8) for _ in range(random.choice([1, 2, 4]))))
write(msix + 3, b"\x00")
restore()
word(0x14).value = 0
assert canary[:] == b"canary!!" * (len(canary) // 8), "the guest's own memory has changed"
print("survived")
