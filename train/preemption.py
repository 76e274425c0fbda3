"""Signals that ask a run to save and stop: SIGTERM, as schedulers preempt, and Ctrl-C."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

from jax._src import distributed  # The coordination service's client has no public name; Orbax takes it here.

from imae_jax.distributed import is_one_of_several

_runs = itertools.count()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the signal that asks the run to stop, or 0.

    Of several processes all call it equally often, with a collective or a barrier between two calls, and all
    get the same answer, whichever of them was signalled. A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def remember(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    # Only the main thread may listen.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    run = next(_runs)
    try:
        if is_one_of_several():
            yield _shared(received, f"imae_jax/stop/{run}/")
        else:
            yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shared(received: list[int], prefix: str) -> Callable[[], int]:
    """What one process received, on all of them.

    It writes the number of its *next* call into the coordination service. That call comes behind a collective
    in which all processes take part, so that all find it there: a question to the service, but no collective
    of its own. JAX's preemption service would do the same for SIGTERM alone, which it takes away from Python
    for good, and Orbax asks it, too, with steps of its own from a thread of its own, which moves the step
    that the processes agree on.
    """
    client, calls = distributed.global_state.client, itertools.count()

    def stop() -> int:
        call, stops = next(calls), dict(client.key_value_dir_get(prefix))
        if received and not stops:
            client.key_value_set(f"{prefix}{call + 1}", str(received[0]), allow_overwrite=True)
        return int(stops.get(f"{prefix}{call}", 0))

    return stop
