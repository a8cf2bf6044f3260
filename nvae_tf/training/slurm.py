"""The tasks of a Slurm job step as workers: the address of each, and which of them this process is.

Slurm tells every task the nodes of its step, the number of tasks on each node and how tasks are
numbered. From this, all tasks compute the same list of addresses in the order of Slurm's ranks. GPUs
stay as Slurm bound them.
"""

import itertools
import math
import re
from collections.abc import Mapping

from nvae_tf.io.errors import UserError, short_repr

MOST_TASKS = 10_000

# All ports are below those that Linux assigns by itself (from 32768). Each step has its own block, and
# successive jobs have successive blocks, so that jobs on the same node use different ports.
FIRST_PORT, PORTS_IN_BLOCK, BLOCKS = 10_000, 8, 2_843
BLOCKS_BETWEEN_STEPS = 499

_NUMBERS = r"\[[0-9,-]+\]"
_NODE = rf"(?:[A-Za-z0-9._-]|{_NUMBERS})+"
_NODES = re.compile(rf"{_NODE}(?:,{_NODE})*")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_COUNT = re.compile(r"([0-9]{1,5})(?:\(x([0-9]{1,5})\))?")


def workers_of_step(environment: Mapping[str, str]) -> tuple[list[str], int]:
    """The addresses of this job step's tasks, and this task's rank.

    One task per node and several per node (one per GPU) are supported, with the distributions
    ``block``, ``cyclic`` and ``plane``. Steps that span components of a heterogeneous job are supported
    as well; the ranks of a component follow those of the one before.

    Args:
        environment: The environment variables of a task, as ``srun`` sets them.

    Returns:
        ``host:port`` of every task in the order of their ranks, and this task's rank. An empty list and
        0 if there are no other tasks: outside of ``srun`` (as in a batch script) or in a step of one
        task.

    Raises:
        UserError: The variables are malformed or contradict each other, the step is of a kind that is
            not supported, or the tasks of this node share its GPUs.
    """
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if environment.get("SLURM_STEP_NUM_TASKS", per_node) == "1":
        return [], 0
    # A step that does not list its nodes has all nodes of the job.
    listed = "SLURM_STEP_NODELIST"
    if listed not in environment and "SLURM_JOB_NODELIST" in environment:
        listed = "SLURM_JOB_NODELIST"
    nodes = expand_nodes(_text(environment, listed), listed)
    job_nodes = environment.get("SLURM_JOB_NODELIST")
    if job_nodes and not set(nodes) <= set(expand_nodes(job_nodes, "SLURM_JOB_NODELIST")):
        # A batch script that was submitted from within a step has inherited that step's variables.
        return [], 0
    per_node = _text(environment, "SLURM_STEP_TASKS_PER_NODE")
    counts = _expand_counts(per_node)
    tasks = sum(counts)
    if "SLURM_STEP_NUM_TASKS" in environment:
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS", MOST_TASKS)
    if len(counts) != len(nodes) or sum(counts) != tasks:
        raise UserError(
            f"Slurm: SLURM_STEP_TASKS_PER_NODE is {short_repr(per_node)}, which does not fit {tasks} "
            f"tasks on {len(nodes)} nodes; start the command with srun"
        )
    tasks_of, nodes, node_of_rank = dict(zip(nodes, counts, strict=True)), [], []
    for component in _components(environment, list(tasks_of)):
        placed = _distribute(environment, [tasks_of[node] for node in component])
        node_of_rank += [len(nodes) + place for place in placed]
        nodes += component
    rank = _number(environment, "SLURM_PROCID", tasks - 1)
    _check_numbering(environment, node_of_rank, rank)
    _check_gpus(environment, tasks_of[nodes[node_of_rank[rank]]])

    first = _first_port(environment)
    local = [itertools.count() for _ in nodes]
    addresses = []
    for node in node_of_rank:
        port = FIRST_PORT + (first + next(local[node])) % (PORTS_IN_BLOCK * BLOCKS)
        addresses.append(f"{nodes[node]}:{port}")
    return addresses, rank


def expand_nodes(text: str, variable: str) -> list[str]:
    """Expands one of Slurm's lists of nodes to their names, in the order of the list.

    Args:
        text: The list, such as ``nv[8-10,12],login,rack[0-1]n[01-16]``.
        variable: Name of the environment variable that holds it, for errors.

    Raises:
        UserError: The text is malformed, names a node twice, or names more than `MOST_TASKS`.
    """
    names: list[str] = []
    try:
        if not _NODES.fullmatch(text):
            raise ValueError
        for node in re.findall(_NODE, text):
            choices = [_choices(part) for part in re.split(f"({_NUMBERS})", node)]
            if len(names) + math.prod(map(len, choices)) > MOST_TASKS:
                raise ValueError
            names += map("".join, itertools.product(*choices))
        if len(set(names)) < len(names):
            raise ValueError
    except ValueError:
        raise UserError(
            f"Slurm: {variable} is {short_repr(text)}; expected at most {MOST_TASKS} different nodes, "
            "such as nv[8-10,12],login"
        ) from None
    return names


def _choices(part: str) -> list[str]:
    """Expands a part of a node's name: ``[08-10]`` to 08, 09 and 10; any other part to itself.

    Raises:
        ValueError: A range is malformed or too long.
    """
    if not part.startswith("["):
        return [part]
    numbers: list[str] = []
    for text in part[1:-1].split(","):
        match = _RANGE.fullmatch(text)
        if not match:
            raise ValueError
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST_TASKS - len(numbers):
            raise ValueError
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


def _expand_counts(text: str) -> list[int]:
    """Expands Slurm's numbers of tasks per node, such as ``3(x2),1`` to 3, 3 and 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if not match or len(counts) + int(match[2] or 1) > MOST_TASKS or int(match[1]) == 0:
            raise UserError(
                f"Slurm: SLURM_STEP_TASKS_PER_NODE is {short_repr(text)}; expected numbers of tasks, "
                "such as 3(x2),1"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _components(environment: Mapping[str, str], nodes: list[str]) -> list[list[str]]:
    """Divides a step's nodes into the components of a heterogeneous job, in the order of Slurm's ranks.

    Args:
        environment: The environment variables, which list the nodes of each component.
        nodes: The step's nodes, which Slurm sorts by name.

    Returns:
        The nodes of each component; a single component if the job is not heterogeneous.

    Raises:
        UserError: The step's nodes are not those of the components.
    """
    if environment.get("SLURM_HET_SIZE", "1") == "1":
        return [nodes]
    for kind in ("HET", "PACK"):  # the second is the name before Slurm 20.02, and also srun's own
        named = re.compile(f"SLURM_JOB_NODELIST_{kind}_GROUP_([0-9]{{1,5}})")
        found = {int(m[1]): name for name in environment if (m := named.fullmatch(name))}
        lists = [expand_nodes(environment[found[n]], found[n]) for n in sorted(found)]
        components = [[node for node in those if node in nodes] for those in lists]
        if sorted(node for those in components for node in those) == sorted(nodes):
            return [those for those in components if those]
    raise UserError(
        f"Slurm: SLURM_STEP_NODELIST has the nodes {short_repr(nodes)}, which are not those of the "
        "components of this heterogeneous job; start the command with srun"
    )


def _distribute(environment: Mapping[str, str], counts: list[int]) -> list[int]:
    """The node of every rank, as Slurm distributes tasks over nodes.

    Args:
        environment: The environment variables. ``srun`` sets ``SLURM_DISTRIBUTION`` if it was given
            one; its default is block. The part after a colon or a comma is about a node's cores.
        counts: Number of tasks on each node.

    Returns:
        For each rank, the index of its node.

    Raises:
        UserError: The distribution does not determine where the tasks are.
    """
    named = environment.get("SLURM_DISTRIBUTION", "block")
    kind = re.split("[:,]", named)[0]
    if len(counts) == 1 or kind in ("block", ""):
        at_a_time = max(counts)
    elif kind == "cyclic":
        at_a_time = 1
    elif kind == "plane":
        at_a_time = max(1, _number(environment, "SLURM_DIST_PLANESIZE", MOST_TASKS))
    else:
        raise UserError(
            f"Slurm: with the distribution {short_repr(named)} a task cannot know where the others "
            "are; start the step with srun -m block"
        )
    nodes: list[int] = []
    left = dict(enumerate(counts))
    while left:
        for node, count in left.items():
            nodes += [node] * min(count, at_a_time)
        left = {node: count - at_a_time for node, count in left.items() if count > at_a_time}
    return nodes


def _check_numbering(environment: Mapping[str, str], node_of_rank: list[int], rank: int) -> None:
    """Checks that this node has the ranks that were computed for it.

    Raises:
        UserError: It has other ranks. With wrong addresses, workers would wait for each other in vain.
    """
    if "SLURM_NODEID" not in environment or "SLURM_GTIDS" not in environment:
        return  # Slurm 22.05 sets both; without them there is nothing to compare
    node = _number(environment, "SLURM_NODEID", MOST_TASKS)
    expected = [number for number, place in enumerate(node_of_rank) if place == node]
    found = _text(environment, "SLURM_GTIDS")
    if rank not in expected or found != ",".join(map(str, expected)):
        raise UserError(
            f"Slurm: rank {rank} is on node {node}, which has the ranks {short_repr(found)}; expected "
            f"{expected[:8]} with the distribution {environment.get('SLURM_DISTRIBUTION', 'block')!r}; "
            "start the step with srun -m block"
        )


def _check_gpus(environment: Mapping[str, str], tasks_here: int) -> None:
    """Checks that the tasks of a node do not use the same GPUs.

    Raises:
        UserError: Together the tasks see more GPUs than the node has in this step.
    """
    visible, on_node = (
        environment.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE")
    )
    if not visible or not re.fullmatch("[0-9]{1,5}", on_node):
        return
    each = len(visible.split(","))
    if tasks_here > 1 and each * tasks_here > int(on_node):
        raise UserError(
            f"Slurm: {tasks_here} tasks share the {on_node} GPUs of this node; give each its own with "
            "srun --gpus-per-task=1, or start one task per node"
        )


def _first_port(environment: Mapping[str, str]) -> int:
    """The first port of this job step, counted from `FIRST_PORT`."""
    job = _number(environment, "SLURM_JOB_ID", 2**32)
    step = _number(environment, "SLURM_STEP_ID", 2**32)
    return (job + BLOCKS_BETWEEN_STEPS * step) % BLOCKS * PORTS_IN_BLOCK


def _text(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name)
    if not text:
        raise UserError(f"Slurm: {name} is not set; start the command with srun")
    return text


def _number(environment: Mapping[str, str], name: str, most: int) -> int:
    text = _text(environment, name)
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > most:
        raise UserError(f"Slurm: {name} is {short_repr(text)}; expected a number up to {most}")
    return int(text)
