"""megaswift's command line with a clock on its rollout engine; prints the seconds of each call as JSON at the end."""

import json
import sys
import time
from typing import Any

from megaswift.cli.main import main
from megaswift.rollout.generate import EmbeddedEngine
from megaswift.rollout.vllm_colocated import ColocatedEngine
from megaswift.rollout.vllm_server import ServedEngine

SPENT: dict[str, list[float]] = {"sync": [], "generate": []}


def timed(kind: Any, name: str, what: str) -> None:
    """Let the method of a class note how long it takes."""
    function = getattr(kind, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = function(*args, **kwargs)
        SPENT[what].append(time.perf_counter() - began)
        return found

    setattr(kind, name, call)


if __name__ == "__main__":
    for engine in (EmbeddedEngine, ColocatedEngine, ServedEngine):
        timed(engine, "load", "sync")
        timed(engine, "complete", "generate")
    code = main(sys.argv[1:])
    sys.stdout.write(json.dumps({name: values[1:] for name, values in SPENT.items()}) + "\n")
    sys.exit(code)
