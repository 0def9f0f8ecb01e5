"""A stand-in for a bus of Feetech STS3215 servos behind a pseudo-terminal, as a program: ``feetech_bus.py FOLDER``.

Written from Feetech's protocol (ff ff id length instruction parameters checksum) and memory table, without their SDK.
Prints the terminal's path. Writes what it is told into ``FOLDER/journal``; ``FOLDER/mute`` makes it silent.
"""

import os
import pty
import sys
import time
import tty
from pathlib import Path

IDS = (1, 2, 3, 4, 5, 6)
PING, READ, WRITE, SYNC_READ, SYNC_WRITE, EVERYBODY = 0x01, 0x02, 0x03, 0x82, 0x83, 0xFE
MODEL, LOW, HIGH, TORQUE, GOAL, PRESENT = 3, 9, 11, 40, 42, 56
SPEED = 3000.0  # counts per second
RANGES = {1: (700, 3400), 2: (800, 3200), 3: (900, 3100), 4: (900, 3200), 5: (0, 4095), 6: (2000, 3500)}


class Servo:
    def __init__(self, number):
        self.memory = bytearray(128)
        self.put(MODEL, 777)
        low, high = RANGES[number]
        self.put(LOW, low)
        self.put(HIGH, high)
        self.where, self.seen = (low + high) / 2, time.monotonic()
        self.put(GOAL, int(self.where))

    def put(self, address, value):
        self.memory[address : address + 2] = int(value).to_bytes(2, "little")

    def get(self, address):
        return int.from_bytes(self.memory[address : address + 2], "little")

    def move(self):
        now = time.monotonic()
        if self.memory[TORQUE]:
            step = SPEED * (now - self.seen)
            self.where += max(-step, min(step, self.get(GOAL) - self.where))
        self.seen = now
        self.put(PRESENT, round(self.where))


class Bus:
    def __init__(self, folder, terminal):
        self.folder, self.terminal = Path(folder), terminal
        self.servos = {number: Servo(number) for number in IDS}
        self.journal = (self.folder / "journal").open("a", buffering=1)

    def note(self, what):
        self.journal.write(f"{time.monotonic()} {what}\n")

    def serve(self):
        data = b""
        while True:
            try:
                data += os.read(self.terminal, 4096)
            except OSError:  # nobody has the terminal open
                time.sleep(0.01)
                continue
            while (begin := data.find(b"\xff\xff")) >= 0 and len(data) >= begin + 4:
                data = data[begin:]
                if len(data) < 4 + data[3]:
                    break
                packet, data = data[: 4 + data[3]], data[4 + data[3] :]
                assert packet[-1] == ~sum(packet[2:-1]) & 0xFF, "checksum"
                self.handle(packet[2], packet[4], packet[5:-1])

    def answer(self, number, values=b""):
        if (self.folder / "mute").exists():
            return
        body = bytes([number, len(values) + 2, 0]) + bytes(values)
        os.write(self.terminal, b"\xff\xff" + body + bytes([~sum(body) & 0xFF]))

    def handle(self, number, instruction, parameters):
        for servo in self.servos.values():
            servo.move()
        if instruction == SYNC_READ:
            address, length = parameters[:2]
            for one in parameters[2:]:
                self.answer(one, self.servos[one].memory[address : address + length])
        elif instruction == SYNC_WRITE:
            address, length = parameters[:2]
            rows = [parameters[k : k + 1 + length] for k in range(2, len(parameters), 1 + length)]
            for row in rows:
                self.servos[row[0]].memory[address : address + length] = row[1:]
            if address == GOAL:
                self.note("goal " + " ".join(str(self.servos[one].get(GOAL)) for one in IDS))
        elif number in self.servos:
            servo = self.servos[number]
            if instruction == READ:
                return self.answer(number, servo.memory[parameters[0] : parameters[0] + parameters[1]])
            if instruction == WRITE:
                servo.memory[parameters[0] : parameters[0] + len(parameters) - 1] = parameters[1:]
                if parameters[0] == TORQUE:
                    self.note(f"torque {number} {parameters[1]}")
            return self.answer(number)
        return None


if __name__ == "__main__":
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    bus = Bus(sys.argv[1], ours)
    print(os.ttyname(theirs), flush=True)
    bus.serve()
