"""The process in which a reward function runs: `python -P -m raytrl.roles.reward.function_process FD PARENT_PID`.

Over the pipe FD it first receives the function's name and where its parent looks for modules, and answers (True, []) once
the function is loaded; then, for each dictionary of keywords, it answers (True, values) or (False, description of the error).
It ends when the pipe closes or the parent is gone. No torch here: the start must be quick.
"""

import asyncio
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from raytrl.errors import ConfigError
from raytrl.functions import NoListError, call_function, import_function, raised


def main() -> None:
    """Serve calls until the pipe closes."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    loop = asyncio.new_event_loop()  # one loop for all calls: an async function may keep a client bound to it
    try:
        try:
            name, sys.path[:] = connection.recv()
            function = import_function(name)
        except ConfigError as error:
            connection.send((False, str(error)))
            return
        except Exception as error:
            connection.send((False, raised(error)))
            return
        connection.send((True, []))
        while True:
            keywords = connection.recv()
            try:
                values = call_function(function, keywords, loop)
            except NoListError as error:
                connection.send((False, str(error)))
            except Exception as error:
                connection.send((False, raised(error)))
            else:
                connection.send((True, values))
    except (EOFError, ConnectionError):  # nobody asks any more; reset: with an answer that was not read
        return


def _end_with(parent: int) -> None:
    """A killed parent must not leave a hanging function behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
