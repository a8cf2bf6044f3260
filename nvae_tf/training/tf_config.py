"""Reads the workers from the environment variable ``TF_CONFIG``. Does not import TensorFlow."""

import json
from typing import NamedTuple

from nvae_tf.io.errors import UserError

TASKS = ("chief", "worker")


class Workers(NamedTuple):
    """All workers, and which of them this process is.

    Attributes:
        hosts: ``host:port`` of each worker, the chief first.
        worker: This process's index in `hosts`.
    """

    hosts: list[str]
    worker: int


def read_tf_config(text: str) -> Workers:
    """Reads the value of ``TF_CONFIG``.

    Args:
        text: The value.

    Raises:
        UserError: The value is malformed, or has tasks of a type other than chief and worker.
    """

    def refuse(reason):
        raise UserError(
            f"TF_CONFIG: {reason}; expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        )

    try:
        content = json.loads(text)
        cluster = {kind: list(hosts) for kind, hosts in content.get("cluster", {}).items()}
        if not all(isinstance(host, str) for hosts in cluster.values() for host in hosts):
            raise ValueError("an address is not text")
        task = content.get("task", {})
        kind, index = str(task.get("type", "worker")), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        refuse(f"not understood ({error})")
    unknown = [name for name in cluster if name not in TASKS]
    if unknown:
        refuse(f"task type {unknown[0]!r} is not used here")
    hosts = [host for name in TASKS for host in cluster.get(name, [])]
    if len(hosts) <= 1:
        return Workers(hosts, 0)
    for key in ("type", "index"):  # which TensorFlow needs as well
        if key not in task:
            refuse(f"the task has no {key}")
    if kind not in cluster or not 0 <= index < len(cluster[kind]):
        refuse(f"there is no task {kind} {index}")
    before = len(cluster.get("chief", [])) if kind == "worker" else 0
    return Workers(hosts, before + index)
