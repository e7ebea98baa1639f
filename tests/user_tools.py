"""A user's file, as written for TRL: tools, and an environment that can do everything wrong."""

import asyncio
import os
import random
import re
import sys
import time
from typing import Any


def multiply(a: int, b: int) -> int:
    """Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


async def wait(seconds: float) -> str:
    """Waits.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"waited {seconds}"


_there: list[str] = []


async def meet(name: str) -> str:
    """Waits for another.

    Args:
        name: Who comes.
    """
    _there.append(name)
    while len(_there) < 2:
        await asyncio.sleep(0.01)
    return " and ".join(_there)


def fail(why: str) -> str:
    """Fails.

    Args:
        why: The message.
    """
    raise ValueError(why)


class Counter:
    """Counts, and remembers what it was told."""

    made = 0

    def __init__(self) -> None:
        Counter.made += 1
        self.count = 0

    def reset(self, seed: int = 0, **row: Any) -> str:
        self.row, self.seed, self.drawn = row, seed, random.random()
        return f" Begin at {self.count}."

    def increment(self, step: int) -> int:
        """Adds to the counter.

        Args:
            step: How much.
        """
        self.count += step
        return self.count

    def misbehave(self, how: str) -> Any:
        """Does something wrong.

        Args:
            how: What.
        """
        if how == "sleep":
            time.sleep(1e6)
        if how == "loop":
            while True:
                pass
        if how == "exit":
            os._exit(3)
        if how == "quit":
            sys.exit(4)
        if how == "c":  # holds the interpreter's lock, and sees no signal
            re.match(r"(a+)+$", "a" * 60 + "b")
        if how == "flood":
            while True:
                print("x" * 1000)
        if how == "large":
            return "y" * 100_000_000
        if how == "image":
            return [{"type": "image", "image": 1}]
        if how == "environment":
            return sorted(os.environ).__str__()
        if how == "folder":
            return os.getcwd()
        if how == "made":
            return f"{Counter.made} {self.drawn} {random.random()} {self.seed} {sorted(self.row)}"
        return "fine"

    def get_reward(self) -> float:
        if self.count == 13:
            raise RuntimeError("unlucky")
        return float(self.count)


class Silent:
    """Says nothing, and has no reward of its own."""

    def reset(self, **row: Any) -> None:
        if row.get("word") == "broken":
            raise KeyError("word")

    def look(self) -> str:
        """Looks around."""
        return "nothing"


class NoReset:
    def look(self) -> str:
        """Looks."""
        return ""


class Undocumented:
    def reset(self) -> None: ...

    def close(self) -> None: ...


def near(prompts: Any, completions: Any, environments: Any, target: Any, **kwargs: Any) -> list[float]:
    """How near each counter is to the row's target."""
    return [-abs(e.count - t) for e, t in zip(environments, target, strict=True)]


def length(completions: Any, **kwargs: Any) -> list[float]:
    """Messages of each."""
    return [float(len(completion)) for completion in completions]
