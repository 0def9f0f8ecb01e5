"""A stand-in for the controller of a Universal Robots arm, on loopback; standard library only.

It speaks RTDE (30004), the dashboard (29999) and the script port (30003) well enough for `ur_rtde`, and plays the part
of the program which that package uploads: a command in input_int_register_0, an answer in output_int_register_0. The
arm is six first-order joints without inertia, gravity or collisions. What the watchdog, a pause and registers in use do
is from UR's manuals; nothing here was compared with a real controller.

It must run in another process than the client, whose constructors hold Python's lock while they wait for it:

    with FakeURProcess(host="127.0.0.2") as controller:  # the ports are fixed, so tests differ by address
        controller.protective_stop(); controller.targets(); controller.cut("close"); controller.restore()

Every address of 127.0.0.0/8 is this computer on Linux; macOS needs `ifconfig lo0 alias`.
"""

import contextlib
import json
import math
import re
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time

PORTS = {"rtde": 30004, "dashboard": 29999, "script": 30003}
HZ = 500.0
VERSION = (5, 11, 0, 108249)
STOPPED, PLAYING, PAUSED = 1, 2, 4  # runtime_state
NORMAL, PROTECTIVE, EMERGENCY = 1, 3, 7  # safety_mode
SAFETY_BITS = {NORMAL: 1 << 0, PROTECTIVE: 1 << 2 | 1 << 10, EMERGENCY: 1 << 6 | 1 << 7 | 1 << 10}
POWERED_OFF, RUNNING = 3, 7  # robot_mode
SERVO_J, SERVO_STOP, SET_WATCHDOG, KICK, STOP_SCRIPT = 11, 16, 35, 99, 255
AT_ONCE = {SERVO_J, KICK}
"""Commands whose end the client does not wait for."""

FORMATS = {"DOUBLE": "d", "INT32": "i", "UINT32": "I", "VECTOR6D": "6d"}
OUTPUTS = {
    "timestamp": "DOUBLE",
    "actual_q": "VECTOR6D",
    "actual_qd": "VECTOR6D",
    "robot_mode": "INT32",
    "safety_mode": "INT32",
    "runtime_state": "UINT32",
    "robot_status_bits": "UINT32",
    "safety_status_bits": "UINT32",
    **{f"output_int_register_{k}": "INT32" for k in range(24)},
    **{f"output_double_register_{k}": "DOUBLE" for k in range(24)},
}
INPUTS = {
    "external_force_torque": "VECTOR6D",
    **{f"input_int_register_{k}": "INT32" for k in range(24)},
    **{f"input_double_register_{k}": "DOUBLE" for k in range(24)},
}


class Client:
    """An accepted connection: its buffers, and what it subscribed to."""

    def __init__(self, sock, kind):
        self.sock, self.kind = sock, kind
        self.received, self.unsent = b"", b""
        self.outputs, self.every, self.started = [], 1, False
        self.recipes = []  # the names of each


class FakeUR:
    """The controller; public methods may be called from any thread.

    Args:
        host: Its address.
        position: Joint angles at the start [rad].
        remote: Whether the pendant is set to Remote Control.
        on_protective: What a protective stop does to the program: ``paused`` (UR's manual) or ``playing``.
        lag_s: Time constant of the joints [s].
    """

    def __init__(
        self, host, position=(0.0, -1.57, 1.57, -1.57, -1.57, 0.0), remote=True, on_protective="paused", lag_s=0.03
    ):
        self.host, self.remote, self.lag_s = host, remote, lag_s
        self.on_protective = {"paused": PAUSED, "playing": PLAYING}[on_protective]
        self.position, self.velocity, self.target = list(position), [0.0] * 6, list(position)
        self.moves = "hold"  # or "servo", "brake"
        self.robot_mode, self.safety_mode, self.runtime = RUNNING, NORMAL, STOPPED
        self.inputs = dict.fromkeys(INPUTS, 0)
        self.outputs = {name: [0.0] * 6 if kind == "VECTOR6D" else 0 for name, kind in OUTPUTS.items()}
        self.executing, self.braking = False, False  # a command that is waited for; whether by standing still
        self.watchdog_hz, self.fed = 0.0, 0.0
        self._targets, self._events, self.uploads = [], [], 0
        self.silent = False
        self.clients, self.listeners = [], []
        self.lock, self.selector = threading.RLock(), selectors.DefaultSelector()
        self.begin, self.cycles = time.monotonic(), 0

    # -- what a test asks and does -------------------------------------------------------------------------------------

    def targets(self):
        """What servoJ asked for: [monotonic time, [angle x 6], time, lookahead, gain] each."""
        return self._targets

    def events(self):
        """[monotonic time, what, detail] of connections, uploads, commands, stops, and packages that are no good."""
        return self._events

    def state(self):
        return {
            "position": self.position,
            "moves": self.moves,
            "runtime": self.runtime,
            "uploads": self.uploads,
            "watchdog_hz": self.watchdog_hz,
            "clients": len(self.clients),
        }

    def protective_stop(self):
        self._note("protective stop")
        self.safety_mode = PROTECTIVE
        self._brake()
        if self.runtime == PLAYING:
            self._program(self.on_protective)

    def emergency_stop(self):
        self._note("emergency stop")
        self.safety_mode, self.robot_mode = EMERGENCY, POWERED_OFF
        self._brake()
        self._program(STOPPED)

    def clear(self):
        """Back to normal; the program stays as it is, and one that is paused is resumed, as on the pendant."""
        self._note("clear")
        self.safety_mode, self.robot_mode = NORMAL, RUNNING
        if self.runtime == PAUSED:
            self._program(PLAYING)

    def stop_program(self):
        """As by the pendant's button."""
        self._program(STOPPED)

    def cut(self, how):
        """Lose the link: ``close`` and ``reset`` end every connection and refuse new ones, ``close, open`` takes new
        ones, ``silent`` neither reads nor sends, ``control`` ends the connection of the commands alone."""
        self._note("cut", how)
        self.silent = how == "silent"
        if how in ("close", "reset"):
            self._unlisten()
        if not self.silent:
            for client in [c for c in self.clients if how != "control" or c.recipes]:
                self._drop(client, reset=how == "reset")

    def restore(self):
        """The cable is in again."""
        self._note("restore")
        self.silent = False
        if not self.listeners:
            self._listen()

    # -- sockets -------------------------------------------------------------------------------------------------------

    def _listen(self):
        for kind, port in PORTS.items():
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, port))
            sock.listen(8)
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, kind)
            self.listeners.append(sock)

    def _unlisten(self):
        for sock in self.listeners:
            self.selector.unregister(sock)
            sock.close()
        self.listeners = []

    def _accept(self, listener, kind):
        sock, _ = listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock, kind)
        self.clients.append(client)
        self.selector.register(sock, selectors.EVENT_READ, client)
        self._note("connect", kind)
        if kind == "dashboard":
            self._write(client, b"Connected: Universal Robots Dashboard Server\n")

    def _drop(self, client, reset=False):
        if client in self.clients:
            self.clients.remove(client)
            self.selector.unregister(client.sock)
            if reset:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sock.close()
            self._note("disconnect", client.kind)

    def _write(self, client, data):
        client.unsent += data
        try:
            client.unsent = client.unsent[client.sock.send(client.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)

    def _read(self, client):
        try:
            data = client.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        client.received += data
        {"rtde": self._packages, "dashboard": self._words, "script": self._programs}[client.kind](client)

    def _note(self, what, detail=""):
        self._events.append((time.monotonic(), what, detail))

    def run(self, end):
        """Serve until `end` (threading.Event) is set."""
        self._listen()
        period = 1.0 / HZ
        deadline = last = time.monotonic()
        while not end.is_set():
            wait = max(0.0, deadline - time.monotonic())
            ready = [] if self.silent else self.selector.select(wait)
            if self.silent:
                time.sleep(wait)  # what the client says piles up in the kernel
            with self.lock:
                for key, _ in ready:
                    with contextlib.suppress(OSError, KeyError, ValueError):  # cut since select
                        if isinstance(key.data, str):
                            self._accept(key.fileobj, key.data)
                        else:
                            self._read(key.data)
                now = time.monotonic()
                if now >= deadline:
                    self._cycle(now, min(now - last, 0.05))
                    last, deadline = now, max(deadline + period, now - 5 * period)

    # -- RTDE ----------------------------------------------------------------------------------------------------------

    def _packages(self, client):
        while len(client.received) >= 3:
            size, kind = struct.unpack_from(">Hc", client.received)
            if len(client.received) < size:
                return
            body, client.received = client.received[3:size], client.received[size:]
            if kind == b"U":
                self._take(client, body)
            else:
                answers = {b"V": self._version, b"v": self._version, b"O": self._subscribe, b"I": self._offer}
                answer = answers.get(kind, self._start)(client, kind, body)
                self._write(client, struct.pack(">Hc", 3 + len(answer), kind) + answer)

    def _version(self, client, kind, body):
        return struct.pack(">4I", *VERSION) if kind == b"v" else bytes([struct.unpack(">H", body)[0] in (1, 2)])

    def _start(self, client, kind, body):
        client.started = kind == b"S"
        return b"\x01"

    def _subscribe(self, client, kind, body):
        names = self._names(body[8:])
        kinds = [OUTPUTS.get(name, "NOT_FOUND") for name in names]
        if "NOT_FOUND" not in kinds:
            client.outputs, client.every = names, max(1, round(HZ / struct.unpack(">d", body[:8])[0]))
        return b"\x01" + ",".join(kinds).encode()

    @staticmethod
    def _names(text):
        return [name for name in text.decode().split(",") if name]

    def _offer(self, client, kind, body):
        names = self._names(body)
        taken = {name for other in self.clients if other is not client for recipe in other.recipes for name in recipe}
        kinds = ["IN_USE" if name in taken else INPUTS.get(name, "NOT_FOUND") for name in names]
        if {"IN_USE", "NOT_FOUND"} & set(kinds):
            return b"\x00" + ",".join(kinds).encode()
        client.recipes.append(names)
        return bytes([len(client.recipes)]) + ",".join(kinds).encode()

    def _take(self, client, body):
        """A package of inputs: a command."""
        names = client.recipes[body[0] - 1] if 1 <= body[0] <= len(client.recipes) else []
        packed = struct.Struct(">" + "".join(FORMATS[INPUTS[name]] for name in names))
        if not names or packed.size != len(body) - 1:
            self._note("bad package", f"recipe {body[0]}: {len(body) - 1} bytes, expected {packed.size}")
            return
        if "external_force_torque" in names:
            return
        self.inputs.update(zip(names, packed.unpack(body[1:])))
        self.fed = time.monotonic()
        command = self.inputs["input_int_register_0"]
        if command == SERVO_J:
            numbers = self._numbers(11)
            self._targets.append((self.fed, numbers[:6], *numbers[8:]))
        elif command not in (0, KICK):
            self._note("command", command)

    def _numbers(self, count):
        return [self.inputs[f"input_double_register_{k}"] for k in range(count)]

    # -- dashboard and scripts -----------------------------------------------------------------------------------------

    def _words(self, client):
        while b"\n" in client.received:
            line, client.received = client.received.split(b"\n", 1)
            asked = line.decode().strip().lower()
            self._note("dashboard", asked)
            if asked == "stop":
                self._program(STOPPED)
            answers = {
                "polyscopeversion": f"URSoftware {'.'.join(map(str, VERSION))} (Jan 01 2024)",
                "get serial number": "20235500001",
                "is in remote control": str(self.remote).lower(),
                "stop": "Stopped",
            }
            self._write(client, answers.get(asked, f"could not understand: '{asked}'").encode() + b"\n")

    def _programs(self, client):
        """``def name(): ... end``, with ``end`` in the first column, is a program: recognised, not interpreted."""
        text = client.received.decode()
        while found := re.match(r"\s*def .*?^end\s*\n", text, re.DOTALL | re.MULTILINE):
            program, text = found.group(), text[found.end() :]
            self._program(STOPPED)
            self.uploads += 1
            self._note("upload", program.split("(", 1)[0].split()[-1])
            if "rtde_cmd()" in program and self.robot_mode == RUNNING and self.safety_mode == NORMAL:
                self._program(PLAYING)
                self._reply(1)
        client.received = text.encode()

    def _program(self, runtime):
        if runtime != self.runtime:
            self._note("runtime", f"{self.runtime}->{runtime}")
        self.runtime = runtime
        if runtime == STOPPED:
            self._brake()
            self.watchdog_hz, self.executing, self.braking = 0.0, False, False  # a watchdog ends with its program

    def _reply(self, value):
        self.outputs["output_int_register_0"] = value

    # -- one cycle -----------------------------------------------------------------------------------------------------

    def _cycle(self, now, elapsed):
        if self.runtime == PLAYING:
            if self.watchdog_hz and now - self.fed > 1.0 / self.watchdog_hz:
                self._note("watchdog", f"{(now - self.fed) * 1e3:.1f} ms")
                self._program(STOPPED)
            elif not self.braking:
                self._script()
        self._move(elapsed)
        if self.braking and self.moves == "hold":
            self.braking = False
            self._reply(2)
        self.outputs.update(
            timestamp=now - self.begin,
            actual_q=self.position,
            actual_qd=self.velocity,
            robot_mode=self.robot_mode,
            safety_mode=self.safety_mode,
            runtime_state=self.runtime,
            safety_status_bits=SAFETY_BITS[self.safety_mode],
            robot_status_bits=(self.robot_mode == RUNNING) | (self.runtime == PLAYING) << 1,
        )
        self.cycles += 1
        if not self.silent:
            for client in [c for c in self.clients if c.started and self.cycles % c.every == 0]:
                self._publish(client)

    def _publish(self, client):
        values = []
        for name in client.outputs:
            values += self.outputs[name] if OUTPUTS[name] == "VECTOR6D" else [self.outputs[name]]
        packed = struct.Struct(">HcB" + "".join(FORMATS[OUTPUTS[name]] for name in client.outputs))
        if len(client.unsent) < 65536:
            self._write(client, packed.pack(packed.size, b"U", 1, *values))

    def _script(self):
        """One turn of the uploaded program's main loop."""
        command = self.inputs["input_int_register_0"]
        if command in AT_ONCE or command == 0:
            if command == SERVO_J and all(map(math.isfinite, self._numbers(6))):
                self.target, self.moves = self._numbers(6), "servo"
            self.executing = self.executing and command != 0
            self._reply(1)
        elif command == STOP_SCRIPT:
            self._program(STOPPED)
        elif not self.executing:
            self.executing = True
            if command == SET_WATCHDOG:
                self.watchdog_hz = self._numbers(1)[0]
            elif command == SERVO_STOP:
                self._brake()
                self.braking = self.moves == "brake"
            if not self.braking:
                self._reply(2)

    def _brake(self):
        if self.moves == "servo":
            self.moves = "brake"

    def _move(self, elapsed):
        if self.moves == "hold" or elapsed <= 0.0:
            self.velocity = [0.0] * 6
            return
        for k in range(6):
            if self.moves == "servo":
                share = 1.0 - math.exp(-elapsed / self.lag_s)
                self.velocity[k] = (self.target[k] - self.position[k]) * share / elapsed
            else:
                slower = max(0.0, abs(self.velocity[k]) - 10.0 * elapsed)
                self.velocity[k] = math.copysign(slower, self.velocity[k])
            self.position[k] += self.velocity[k] * elapsed
        if self.moves == "brake" and not any(self.velocity):
            self.moves = "hold"


class FakeURProcess:
    """A `FakeUR` in a process of its own, with the same public methods."""

    def __init__(self, **options):
        words = [sys.executable, __file__, json.dumps(options)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if (first := self._process.stdout.readline().strip()) != '"ready"':
            raise RuntimeError(f"the stand-in did not start: {first}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def __getattr__(self, name):
        def call(*arguments):
            self._process.stdin.write(json.dumps([name, arguments]) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

        return call


def main():
    fake, end = FakeUR(**json.loads(sys.argv[1])), threading.Event()
    thread = threading.Thread(target=fake.run, args=(end,))
    thread.start()
    while not fake.listeners:
        time.sleep(1e-3)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:  # until who started it closes the pipe, or dies
        name, arguments = json.loads(line)
        with fake.lock:
            answer = getattr(fake, name)(*arguments)
        print(json.dumps(answer), flush=True)
    end.set()
    thread.join()


if __name__ == "__main__":
    main()
