"""Processes of this machine, by what started them (Linux)."""

from pathlib import Path


def descendants(parent, word=""):
    """Numbers of the processes below one whose command line holds a word."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has ended meanwhile
            parents[int(folder.name)] = int(status["PPid"])
    found, below = [], {parent}
    while below:
        below = {pid for pid, owner in parents.items() if owner in below}
        found += [pid for pid in below if word in commands.get(pid, "")]
    return sorted(found)
