"""Whether the other workers that ``TF_CONFIG`` names can be reached."""

import socket
from concurrent.futures import ThreadPoolExecutor

from nvae_tf.diagnosis.findings import Finding, ok, problem, warning
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.training.rendezvous import host_and_port, listening
from nvae_tf.training.tf_config import read_tf_config

SECONDS = 5.0  # to wait for each
AT_ONCE = 32


def check_workers(text: str) -> list[Finding]:
    """Whether this worker can listen at its address, and what answers at the others'.

    Args:
        text: The value of ``TF_CONFIG``.
    """
    try:
        hosts, worker = read_tf_config(text)
        addresses = [host_and_port(host) for host in hosts]
    except UserError as error:
        return [problem(str(error))]
    if len(hosts) <= 1:
        return [ok("TF_CONFIG names no other worker")]
    findings = [ok(f"TF_CONFIG: this is worker {worker} of {len(hosts)} ({hosts[worker]})")]
    try:
        with listening(hosts[worker]):
            pass
    except UserError as error:
        findings.append(problem(str(error)))
    others = [number for number in range(len(hosts)) if number != worker]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        findings += pool.map(lambda number: _ask(number, hosts[number], addresses[number]), others)
    return findings


def _ask(number: int, host: str, address: tuple[str, int]) -> Finding:
    try:
        socket.create_connection(address, SECONDS).close()
    except ConnectionRefusedError:
        return warning(
            f"worker {number} ({host}): the machine answers, but no worker listens there",
            "start it, or correct the port",
        )
    except (OSError, ValueError) as error:
        return problem(
            f"worker {number} ({host}) cannot be reached ({short_message(error)})",
            "correct the address, or look at the network and its firewalls",
        )
    return ok(f"worker {number} ({host}) answers")
