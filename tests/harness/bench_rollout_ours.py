"""megaswift's command line with a clock on its rollout engine; prints the seconds of each call as JSON at the end."""

import json
import sys
import time
from typing import Any

from megaswift.cli.main import main
from megaswift.rollout.generate import EmbeddedEngine
from megaswift.rollout.vllm_colocated import ColocatedEngine
from megaswift.rollout.vllm_server import ServedEngine
from megaswift.training.engine import Engine

SPENT: dict[str, list[float]] = {"sync": [], "generate": [], "cpu": []}


def timed(kind: Any, name: str, what: str) -> None:
    """Let the method of a class note how long it takes."""
    function = getattr(kind, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = function(*args, **kwargs)
        SPENT[what].append(time.perf_counter() - began)
        return found

    setattr(kind, name, call)


def clocked(function: Any) -> Any:
    """Return a training step that notes how much of the processors this process used since the end of the last one."""
    last: list[float] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        now = time.process_time()
        SPENT["cpu"] += [now - one for one in last]
        last[:] = [now]
        return found

    return call


if __name__ == "__main__":
    Engine.train_step = clocked(Engine.train_step)  # type: ignore[method-assign]  # for this measurement
    for engine in (EmbeddedEngine, ColocatedEngine, ServedEngine):
        timed(engine, "load", "sync")
        timed(engine, "complete", "generate")
    code = main(sys.argv[1:])
    SPENT.update(
        {name: SPENT[name][1:] for name in ("sync", "generate")}
    )  # kernels are compiled in the first
    sys.stdout.write(json.dumps(SPENT) + "\n")
    sys.exit(code)
