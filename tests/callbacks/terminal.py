"""A terminal's screen: what a person sees after a program has written, moved its cursor and erased."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b.")


class Screen:
    """Lines of a terminal so wide that scrolls without end; it knows what progress bars use."""

    def __init__(self, width: int) -> None:
        self.width, self.row, self.column = width, 0, 0
        self.lines: list[list[str]] = [[]]

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            found = SEQUENCE.match(text, at)
            if found:
                self.control(found[1] or "", found[2] or "")
                at = found.end()
            else:
                self.put(text[at])
                at += 1

    def control(self, arguments: str, name: str) -> None:
        number = int(arguments) if arguments.isdigit() else 1
        if name == "A":
            self.row = max(self.row - number, 0)
        elif name == "B":
            self.move_down(number)
        elif name == "K":
            line = self.lines[self.row]
            self.lines[self.row] = [] if arguments == "2" else line[: self.column]
        elif name not in "mhl":
            raise AssertionError(f"the screen does not know {arguments}{name}")

    def move_down(self, number: int) -> None:
        self.row += number
        self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]

    def put(self, letter: str) -> None:
        if letter == "\n":
            self.move_down(1)
        elif letter == "\r":
            self.column = 0
        elif letter >= " ":
            if self.column == self.width:  # a terminal wraps at the next letter, not at the last column
                self.move_down(1)
                self.column = 0
            line = self.lines[self.row]
            line += " " * (self.column + 1 - len(line))
            line[self.column] = letter
            self.column += 1

    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def run(arguments: list[str], width: int, folder: Path) -> list[str]:
    """The lines on the screen after a Python program has ended, which must end well."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment, "cwd": folder}
    with subprocess.Popen([sys.executable, *arguments], **options) as process:  # type: ignore[call-overload]
        os.close(theirs)
        written = bytearray()
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # on Linux the end of a terminal is an error
                break
            if not part:
                break
            written += part
    os.close(ours)
    screen = Screen(width)
    screen.feed(written.decode())
    assert process.returncode == 0, "\n".join(screen.text())
    return screen.text()
