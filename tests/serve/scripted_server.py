"""A server over the scripted engine in a process of its own: `python -m tests.serve.scripted_server STORE [PACE_S]`.

Prints its address, and ends as the real one does.
"""

import sys
from typing import Any

from serve.api import Bounds, create_app
from serve.listening import address_of, listen, make_server
from serve.store import Store
from tests.serve.conftest import ScriptedEngine


def main(store: str, pace: str = "0") -> None:
    """Serve until told to stop."""
    engine: Any = ScriptedEngine()
    engine.pace = float(pace)
    app = create_app(engine, Bounds(1000, keeps=True), store=Store(store))
    with listen("127.0.0.1", 0) as listener:
        address = address_of("127.0.0.1", listener.getsockname()[1])
        server = make_server(app, 5, lambda: sys.stdout.write(f"{address}\n") and None)
        sys.stdout.flush()
        server.run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
