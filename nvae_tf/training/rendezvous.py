"""Waits until all workers of a cluster have started.

TensorFlow waits for workers for an hour without a word, and neither Ctrl-C nor SIGTERM ends that. Here
every worker listens on its own address until it has reached all the others'; TensorFlow, which listens
on the same addresses, is started then.
"""

import contextlib
import socket
import time

from nvae_tf.io.errors import UserError

JOIN_SECONDS = 600  # that workers wait for each other
RETRY_SECONDS = 0.5
CONNECT_SECONDS = 5.0


def wait_for_all(hosts: list[str], worker: int, seconds: float) -> None:
    """Returns once every worker's address answers.

    Args:
        hosts: ``host:port`` of all workers.
        worker: This worker's index.
        seconds: Seconds to wait at most.

    Raises:
        UserError: A worker is still missing then, or this worker's own port is taken.
    """
    begin = time.monotonic()
    with _listening(hosts[worker]):
        missing = {number: host for number, host in enumerate(hosts) if number != worker}
        told = False
        while missing := {n: host for n, host in missing.items() if not _answers(host)}:
            names = ", ".join(f"{number} ({host})" for number, host in missing.items())
            if time.monotonic() - begin >= seconds:
                raise UserError(
                    f"worker {names} did not join within {seconds:g} seconds; start all workers, with "
                    "the same addresses, or wait longer with --join_timeout"
                )
            if not told:
                print(f"waiting for worker {names}", flush=True)
                told = True
            time.sleep(RETRY_SECONDS)


@contextlib.contextmanager
def _listening(address: str):
    _, port = _parts(address)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=4096
        )
    except OSError as error:
        raise UserError(
            f"{address}: this worker cannot listen there ({error.strerror}); choose another port in "
            "TF_CONFIG, or end the process that has it"
        ) from None
    with listener:
        yield


def _answers(address: str) -> bool:
    try:
        socket.create_connection(_parts(address), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"TF_CONFIG: {address!r} is not the address of a worker; expected host:port"
        )
    return host.strip("[]"), int(port)
