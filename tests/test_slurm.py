"""The workers of a Slurm job step, from the variables that Slurm 22.05 sets in its tasks."""

import os

import pytest

from nvae_tf.io.errors import UserError
from nvae_tf.training.slurm import MOST_TASKS, expand_nodes, workers_of_step


def environment(
    rank, node, here, per_node, distribution=None, nodes="nv[9-10]", job=4711, step=0, **more
):
    """What srun sets in a task: ``here`` are the ranks of the task's node."""
    count = sum(
        int(number) * int(times.rstrip(")") or 1)
        for number, _, times in (part.partition("(x") for part in per_node.split(","))
    )
    variables = {
        "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": nodes, "SLURM_STEP_ID": step,
        "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_NUM_TASKS": count, "SLURM_NTASKS": count,
        "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_PROCID": rank, "SLURM_NODEID": node,
        "SLURM_LOCALID": here.split(",").index(str(rank)), "SLURM_GTIDS": here, **more,
    }  # fmt: skip
    if distribution is not None:
        variables["SLURM_DISTRIBUTION"] = distribution
    return {name: str(value) for name, value in variables.items() if value is not None}


def nodes_and_ports(*arguments, **options):
    addresses, rank = workers_of_step(environment(*arguments, **options))
    assert rank == arguments[0]
    assert len(set(addresses)) == len(addresses)
    return [(host, int(port)) for host, _, port in (each.rpartition(":") for each in addresses)]


def nodes(*arguments, **options):
    return [host for host, _ in nodes_and_ports(*arguments, **options)]


def test_nv9_comes_before_nv10():
    for rank in (0, 1):
        assert nodes(rank, rank, str(rank), "1(x2)") == ["nv9", "nv10"]
    # As in a batch script with --ntasks-per-node=1.
    assert nodes(1, 1, "1", "1(x2)", "cyclic") == ["nv9", "nv10"]


# Rank, node, ranks of the node, tasks per node, distribution: as Slurm 22.05 set them; and all nodes.
SEEN = {
    "default": ((3, 1, "3", "3,1", None), "9 9 9 10"),
    "block": ((1, 0, "0,1", "2(x2)", "block"), "9 9 10 10"),
    "cyclic": ((2, 0, "0,2,3", "3,1", "cyclic"), "9 10 9 9"),
    "cyclic, with cores": ((1, 1, "1", "3,1", "cyclic:block"), "9 10 9 9"),
    "cyclic, packed": ((0, 0, "0,2,3,4", "4,1", "cyclic,pack"), "9 10 9 9 9"),
    "default with cores": ((1, 1, "1", "1(x2)", "block:cyclic:cyclic"), "9 10"),
}


@pytest.mark.parametrize("name", SEEN)
def test_the_distributions_of_slurm(name):
    arguments, expected = SEEN[name]
    assert nodes(*arguments) == [f"nv{number}" for number in expected.split()]


def test_as_little_as_slurm_has_to_say():
    variables = {
        "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "nv[9-10]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1",
    }  # fmt: skip
    addresses, rank = workers_of_step(variables)
    assert rank == 1
    assert [address.partition(":")[0] for address in addresses] == ["nv9", "nv10"]


def test_planes_of_two_tasks():
    plane = dict(distribution="plane", SLURM_DIST_PLANESIZE=2)
    expected = ["nv9", "nv9", "nv10", "nv10", "nv9", "nv9"]
    assert nodes(4, 0, "0,1,4,5", "4,2", **plane) == expected
    assert nodes(3, 1, "2,3", "4,2", **plane) == expected


def test_tasks_of_a_node_have_ports_of_their_own():
    found = nodes_and_ports(0, 0, "0,2", "2(x2)", "cyclic")
    (first, port), (second, same), (_, third), (_, fourth) = found
    assert (first, second) == ("nv9", "nv10") and port == same and third == fourth == port + 1
    assert all(1024 < number < 32768 for _, number in found)


def test_jobs_and_steps_that_share_a_node_have_ports_of_their_own():
    seen = set()
    for job in range(100_000, 100_020):
        for step in range(4):
            ports = {port for _, port in nodes_and_ports(0, 0, "0,1", "2(x2)", job=job, step=step)}
            assert len(ports) == 2 and not ports & seen
            seen |= ports
    assert max(seen) < 32768


def test_all_tasks_compute_the_same_addresses():
    tasks = [(rank, rank % 3, f"{rank % 3},{rank % 3 + 3}") for rank in range(6)]
    found = [
        workers_of_step(environment(*task, "2(x3)", "cyclic", nodes="a[08-10]")) for task in tasks
    ]
    assert [rank for _, rank in found] == list(range(6))
    assert all(addresses == found[0][0] for addresses, _ in found)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # A batch script with two nodes, which has not called srun.
        dict(SLURM_JOB_ID="14", SLURM_JOB_NODELIST="nv[9-10]", SLURM_NTASKS="2",
             SLURM_TASKS_PER_NODE="1(x2)", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_GTIDS="0"),
        # A step of one task in it.
        environment(0, 0, "0", "1", "cyclic", nodes="nv9"),
        # A batch script that a task submitted, with the variables of the task's step.
        environment(0, 0, "0", "1(x2)", SLURM_JOB_NODELIST="nv8"),
    ],
)  # fmt: skip
def test_a_process_alone(variables):
    assert workers_of_step(variables) == ([], 0)


def test_one_task_per_gpu():
    bound = dict(CUDA_VISIBLE_DEVICES=1, SLURM_GPUS_ON_NODE=2, SLURM_STEP_GPUS=1)
    assert nodes(1, 0, "0,1", "2(x2)", **bound) == ["nv9", "nv9", "nv10", "nv10"]
    all_gpus = dict(CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE=2)
    assert nodes(1, 1, "1", "1(x2)", **all_gpus) == ["nv9", "nv10"]
    with pytest.raises(UserError, match="2 tasks share the 2 GPUs of this node.*gpus-per-task=1"):
        nodes(1, 0, "0,1", "2(x2)", **all_gpus)


def test_a_heterogeneous_job():
    groups = dict(
        SLURM_HET_SIZE=2,
        SLURM_JOB_NODELIST_HET_GROUP_0="nv10",
        SLURM_JOB_NODELIST_HET_GROUP_1="nv[8-9]",
    )
    within = dict(nodes="nv[8-9]", distribution="block")
    assert nodes(2, 1, "2", "2,1", **within, **groups) == ["nv8", "nv8", "nv9"]
    # As Slurm 22.05 sets them: the nodes are sorted by name, the ranks by component.
    all_nodes = dict(nodes="nv[8-10]", distribution="block")
    assert nodes(3, 1, "2,3", "2,1,2", **all_nodes, **groups) == [
        "nv10", "nv10", "nv8", "nv8", "nv9",
    ]  # fmt: skip
    del groups["SLURM_JOB_NODELIST_HET_GROUP_1"]
    with pytest.raises(UserError, match="not those of the components of this heterogeneous job"):
        nodes(3, 1, "2,3", "2,1,2", **all_nodes, **groups)


MALFORMED = {
    "no nodes": dict(SLURM_STEP_NODELIST=None, SLURM_JOB_NODELIST=None),
    "no number": dict(SLURM_STEP_NUM_TASKS="two"),
    "too many tasks": dict(SLURM_STEP_NUM_TASKS="9" * 5000),
    "other tasks": dict(SLURM_STEP_NUM_TASKS="3"),
    "tasks of a third node": dict(SLURM_STEP_TASKS_PER_NODE="1(x3)"),
    "endless tasks": dict(SLURM_STEP_TASKS_PER_NODE="1(x99999)"),
    "no tasks": dict(SLURM_STEP_TASKS_PER_NODE="2,0"),
    "no counts": dict(SLURM_STEP_TASKS_PER_NODE="(x2)"),
    "no rank": dict(SLURM_PROCID=None),
    "a rank that is not there": dict(SLURM_PROCID="2"),
    "a negative rank": dict(SLURM_PROCID="-1"),
    "another node": dict(SLURM_NODEID="1"),
    "other ranks on this node": dict(SLURM_GTIDS="0,1"),
    "no job": dict(SLURM_JOB_ID="batch"),
    "no step": dict(SLURM_STEP_ID=None),
    "any order": dict(SLURM_DISTRIBUTION="arbitrary"),
    "no size of planes": dict(SLURM_DISTRIBUTION="plane"),
    "line breaks": dict(SLURM_DISTRIBUTION="a\nb"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_variables(name):
    variables = environment(0, 0, "0", "1(x2)") | MALFORMED[name]
    with pytest.raises(UserError, match="^Slurm: ") as error:
        workers_of_step({key: value for key, value in variables.items() if value is not None})
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("nv9", "nv9"),
        ("nv[8-10,12]", "nv8 nv9 nv10 nv12"),
        ("nv[10,9]", "nv10 nv9"),
        ("a[01-03]b", "a01b a02b a03b"),
        ("a[8-9],a[08-09]", "a8 a9 a08 a09"),
        ("login,gpu-[1-2].cluster,x7", "login gpu-1.cluster gpu-2.cluster x7"),
        ("rack[0-1]n[09-10]", "rack0n09 rack0n10 rack1n09 rack1n10"),
        ("n[099-101]", "n099 n100 n101"),
        ("[1-2]", "1 2"),
    ],
)
def test_lists_of_nodes(text, expected):
    assert expand_nodes(text, "LIST") == expected.split()


@pytest.mark.parametrize(
    "text",
    ["", ",", "a,", ",a", "a,,b", "a[", "a]", "a[]", "a[1", "a[1-]", "a[-1]", "a[2-1]", "a[1,]", "a[x]",
     "a[1-2-3]", "a[[1]]", "a b", "a\n", "a/b", "a,a", "a[1,1]", "a[8-10],a[08-10]",
     "a[0-10000]", "a[0-999999999]",
     "a[0-99]b[0-99]c[0-99]", "a[0-99999999999999999999]", "a[" + "0-9999," * 10_000 + "1]",
     "n" * 100_000 + "[", "[1]" * 50_000 + "!", "a[²]", "a[0-9]" + "b[0-9]" * 10_000],
)  # fmt: skip
def test_malformed_lists_of_nodes(text):
    with pytest.raises(UserError, match="^Slurm: LIST is .*such as nv") as error:
        expand_nodes(text, "LIST")
    assert len(str(error.value)) < 400


def test_as_many_nodes_as_are_allowed():
    assert len(expand_nodes(f"n[1-{MOST_TASKS}]", "LIST")) == MOST_TASKS
    many = f"n[1-{MOST_TASKS}]"
    last = MOST_TASKS - 1
    assert nodes(last, last, str(last), f"1(x{MOST_TASKS})", nodes=many)[-1] == f"n{MOST_TASKS}"


@pytest.fixture
def slurm_task(monkeypatch):
    """Makes this process task 1 of a step of two."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment(1, 1, "1", "1(x2)").items():
        monkeypatch.setenv(name, value)


def test_what_tensorflow_is_told(slurm_task, monkeypatch):
    from nvae_tf.training import cluster

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    resolver, worker, hosts = cluster._resolver()
    assert worker == 1 and [host.partition(":")[0] for host in hosts] == ["nv9", "nv10"]
    assert resolver.cluster_spec().as_dict() == {"worker": hosts}
    assert (resolver.task_type, resolver.task_id, resolver.rpc_layer) == ("worker", 1, "grpc")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1"]}}')  # is asked first
    assert cluster._resolver() == (None, 0, ["a:1"])


def test_a_malformed_variable_is_one_line(slurm_task, recipe, tmp_path, monkeypatch, capsys):
    from nvae_tf.cli.train import main

    monkeypatch.setenv("SLURM_STEP_NODELIST", "nv[9-")
    assert main(["--config", str(recipe), "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Slurm: SLURM_STEP_NODELIST is") and error.count("\n") == 1
