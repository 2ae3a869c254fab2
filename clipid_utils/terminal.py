"""How the command `clipid` speaks to a terminal: short errors, Ctrl-C, and `~` in arguments."""

import difflib
import os
import re
import signal
from collections.abc import Collection


def short(box: str, name: str, commands: Collection[str]) -> str:
    """tyro's box around an error as one line: the problem, the nearest name, and where the options are listed."""
    prog = f"clipid {name}" if name in commands else "clipid"
    inside = re.sub("[│╭╮╰╯|+]", " ", re.sub(r"\x1b\[[\d;]*m", "", box).partition("\n")[2])
    problem, *rest = (text for part in re.split("[─-]{4,}", inside) if (text := " ".join(part.split())))
    nearest = re.findall(r"Perhaps you meant: (--[\w.-]+)", "\n".join(rest))
    nearest += [] if name in commands else difflib.get_close_matches(name, commands, 1)
    guess = f": did you mean {nearest[0]}?" if nearest else ""
    return f"{prog}: {problem}{guess} ({prog} --help)"


def stop(number: int, frame) -> None:
    """Ctrl-C raises KeyboardInterrupt, but ends the process at once during an import, and when it comes again."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # an import may swallow the exception
            os.write(2, b"stopped\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def with_home(word: str) -> str:
    """An argument with `~` expanded, where the shell leaves it: in quotes and behind `=`."""
    option, sign, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return option + sign + os.path.expanduser(value)
