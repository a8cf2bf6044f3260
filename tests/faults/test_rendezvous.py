"""How workers meet: each ends with one clear line, whatever answers at the others' addresses."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import free_ports

from nvae_tf.io.errors import UserError
from nvae_tf.training import rendezvous
from nvae_tf.training.rendezvous import tell_others, wait_for_all

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 2.0)


def addresses(count):
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def meet(lists, seconds=20.0, delays=(), numbers=None):
    """What became of workers that are threads of this process: the line of each, or None.

    Args:
        lists: The addresses that each worker was started with.
        seconds: That they wait for each other; one number, or one for each.
        delays: Seconds before each of them starts.
        numbers: The index of each; default: its place in `lists`.
    """
    lines = [""] * len(lists)

    def work(place):
        time.sleep(delays[place] if delays else 0.0)
        limit = seconds[place] if isinstance(seconds, tuple) else seconds
        try:
            lines[place] = wait_for_all(lists[place], (numbers or range(99))[place], limit)
        except UserError as error:
            lines[place] = str(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    return lines


def assert_free(hosts):
    """TensorFlow can listen on all of the addresses now."""
    for host in hosts:
        socket.create_server(("", int(host.rpartition(":")[2]))).close()


@contextlib.contextmanager
def program(host, behave):
    """Another program at an address: `behave` gets each connection."""
    listener = socket.create_server(("127.0.0.1", int(host.rpartition(":")[2])))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection):
        with contextlib.suppress(OSError), connection:
            behave(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def silent(connection):
    time.sleep(60.0)


def web_server(connection):
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def talkative(connection):
    while True:
        connection.sendall(b"x" * 65536)


def greeting(connection):
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    connection.recv(1000)


@pytest.mark.parametrize("count", [2, 3, 12])
def test_all_meet(count):
    hosts = addresses(count)
    assert meet([hosts] * count) == [None] * count
    assert_free(hosts)


def test_one_comes_late(capsys):
    hosts = addresses(3)
    assert meet([hosts] * 3, delays=(0.0, 2.0, 0.0)) == [None] * 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # of the two others, one each
    for line in lines:
        assert line == f"waiting for worker 1 ({hosts[1]}: Connection refused)"


def test_one_never_comes():
    hosts = addresses(3)
    begin = time.monotonic()
    lines = meet([hosts] * 2, seconds=(2.0, 60.0))  # the second one hears it from the first
    assert time.monotonic() - begin < 10.0
    reason = f"worker 2 ({hosts[2]}: Connection refused) did not join within 2 seconds; start all"
    assert lines[0].startswith(reason)
    assert lines[1].startswith(f"worker 0 ({hosts[0]}) refused: {reason}")


def test_one_that_is_killed_while_others_wait():
    hosts = addresses(3)
    script = (
        f"from nvae_tf.training.rendezvous import wait_for_all\nwait_for_all({hosts!r}, 1, 60.0)"
    )
    command = [sys.executable, "-u", "-c", script]
    victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    lines = []
    chief = threading.Thread(target=lambda: lines.extend(meet([hosts], seconds=5.0)))
    chief.start()
    assert f"waiting for worker 2 ({hosts[2]}" in victim.stdout.readline().decode()
    victim.kill()
    victim.communicate()
    lines += meet([hosts], seconds=5.0, numbers=(2,))
    chief.join(60.0)
    assert len(lines) == 2
    for line in lines:
        assert f"worker 1 ({hosts[1]}: Connection refused) did not join" in line


def test_one_that_is_started_again_while_others_wait(monkeypatch):
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.5)  # so that the chief leaves between asks
    hosts = addresses(2)
    # It hears the chief, but does not reach it, until it is started again.
    script = f"""
import socket
from nvae_tf.training import rendezvous
def refuse(*_): raise OSError("cannot be resolved")
rendezvous.socket.create_connection = refuse
rendezvous.wait_for_all({hosts!r}, 1, 60.0)
"""
    victim = subprocess.Popen([sys.executable, "-u", "-c", script], cwd=ROOT)
    lines = []
    chief = threading.Thread(target=lambda: lines.extend(meet([hosts], seconds=30.0)))
    chief.start()
    time.sleep(5.0)
    victim.kill()
    victim.communicate()
    time.sleep(1.0)  # meanwhile the chief is refused there
    lines += meet([hosts], seconds=10.0, numbers=(1,))
    chief.join(60.0)
    assert lines == [None, None]


def test_one_that_stalls_before_it_confirms(monkeypatch):
    monkeypatch.setattr(rendezvous, "TALK_SECONDS", 1.0)  # the chief's
    hosts = addresses(2)
    script = f"""
import time
from nvae_tf.training import rendezvous
judge = rendezvous._Meeting._judge
def stall(meeting, number, question, line, answer):
    judge(meeting, number, question, line, answer)
    if answer and answer.state == rendezvous.GO:
        time.sleep(3.0)
rendezvous._Meeting._judge = stall
rendezvous.wait_for_all({hosts!r}, 1, 60.0)
time.sleep(1.0)  # as it goes on to train
"""
    worker = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    assert meet([hosts], seconds=30.0) == [None]
    assert worker.wait(60.0) == 0


@pytest.mark.parametrize("behave", [silent, web_server, talkative, greeting])
def test_another_program_at_a_workers_address(behave, monkeypatch):
    monkeypatch.setattr(rendezvous, "TALK_SECONDS", 1.0)
    hosts = addresses(3)
    begin = time.monotonic()
    with program(hosts[2], behave):
        lines = meet([hosts] * 2, seconds=3.0)
    assert time.monotonic() - begin < 10.0
    why = "timed out" if behave is silent else "the program that answers there is not a worker"
    for line in lines:
        assert f"worker 2 ({hosts[2]}: {why}) did not join within 3 seconds" in line
    assert_free(hosts)


def test_another_program_makes_way_for_the_worker():
    """TensorFlow of a worker's earlier process may answer for some seconds, for example."""
    hosts = addresses(2)
    lines = []
    chief = threading.Thread(target=lambda: lines.extend(meet([hosts])))
    with program(hosts[1], web_server):
        chief.start()
        time.sleep(1.0)
    rest = meet([hosts], numbers=(1,))
    chief.join(60.0)
    assert lines + rest == [None, None]


def test_a_name_that_leads_back_to_the_same_process():
    hosts = addresses(2)
    mine = [hosts[0], hosts[0].replace("127.0.0.1", "localhost")]
    (line,) = meet([mine])
    assert f"the address of worker 1 ({mine[1]}) leads to this process, which is worker 0" in line


def test_a_wrong_index():
    """Two processes with index 0 on different machines, which use the same port."""
    port = free_ports(1)[0]
    hosts = [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
    mine = socket.create_server(
        ("127.0.0.2", port)
    )  # the second machine's, before the first starts
    meeting = rendezvous._Meeting(hosts, 0)
    threading.Thread(target=meeting.answer_all, args=(mine,), daemon=True).start()
    original = rendezvous.listening

    @contextlib.contextmanager
    def only_here(address):
        with socket.create_server(("127.0.0.1", port)) as listener:
            yield listener

    rendezvous.listening = only_here
    try:
        (line,) = meet([hosts], seconds=5.0)
    finally:
        rendezvous.listening = original
        meeting.end()
    assert f"worker 0 answers at the address of worker 1 ({hosts[1]}); correct the index" in line


def test_a_name_that_only_one_side_knows():
    hosts = addresses(2)
    begin = time.monotonic()
    script = (
        "import socket, sys\n"
        "resolve = socket.getaddrinfo\n"
        "def getaddrinfo(host, *more, **options):\n"
        "    if host == '127.0.0.1':\n"
        "        raise socket.gaierror(-2, 'Name or service not known')\n"
        "    return resolve(host, *more, **options)\n"
        "socket.getaddrinfo = getaddrinfo\n"
        "from nvae_tf.io.errors import UserError\n"
        "from nvae_tf.training import rendezvous\n"
        "try:\n"
        f"    rendezvous.wait_for_all({hosts!r}, int(sys.argv[1]), float(sys.argv[2]))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    for number in (0, 1):  # the chief, or the other one, does not know a name
        why = f"worker {1 - number} ({hosts[1 - number]}: Name or service not known)"
        for here, there in ((3.0, 60.0), (60.0, 3.0)):
            command = [sys.executable, "-c", script, str(number), str(there)]
            other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            (line,) = meet([hosts], seconds=here, numbers=(1 - number,))
            output, _ = other.communicate(timeout=60)
            assert why in line and "did not join within 3 seconds" in line
            assert "did not join within 3 seconds" in output and output.count("\n") <= 2
    assert time.monotonic() - begin < 40.0


def test_other_addresses():
    hosts = addresses(3)
    for other in ([hosts[0], hosts[2], hosts[1]], hosts[:2]):
        # The last one later: in another order, two workers have the same address on this machine.
        lines = meet([hosts, other, hosts], delays=(0.0, 0.0, 0.5))
        assert all(line and "\n" not in line for line in lines)
        assert sum("was started with other addresses than this one" in line for line in lines) >= 2


def test_an_address_of_another_cluster_alone():
    """The other side does not ask this one, whose address it has not, but answers and is asked."""
    hosts = addresses(3)
    first, second = meet([[hosts[0], hosts[1]], [hosts[2], hosts[1]]], seconds=3.0)
    assert f"worker 1 ({hosts[1]}) was started with other addresses" in first
    assert f"worker 0 ({hosts[2]}: Connection refused) did not join within 3 seconds" in second
    assert "127.0.0.1 asked, but has other addresses" in second


def test_another_version(monkeypatch):
    hosts = addresses(2)

    def newer(connection):
        connection.recv(1000)
        connection.sendall(b"nvae-tf-meeting 2 something new\n")

    with program(hosts[1], newer):
        (line,) = meet([hosts])
    assert f"worker 1 ({hosts[1]}) has another version of nvae-tf" in line


@pytest.mark.parametrize("refusing", [0, 2])
def test_one_that_refuses_tells_the_others(refusing):
    hosts = addresses(3)
    begin = time.monotonic()
    others = tuple(number for number in range(3) if number != refusing)
    lines = []
    meeting = threading.Thread(
        target=lambda: lines.extend(meet([hosts] * 2, seconds=60.0, numbers=others))
    )
    meeting.start()
    tell_others(hosts, refusing, "runs/a holds a run already:\n\x1b[31mcontinue it", 20.0)
    meeting.join(60.0)
    assert time.monotonic() - begin < 8.0
    reason = "runs/a holds a run already:\\n\\x1b[31mcontinue it"
    assert lines == [f"worker {refusing} ({hosts[refusing]}) refused: {reason}"] * 2
    assert_free(hosts)


def test_one_that_refuses_alone_ends():
    hosts = addresses(2)
    begin = time.monotonic()
    tell_others(hosts, 0, "no data", 1.0)
    assert time.monotonic() - begin < 3.0


@pytest.fixture
def heeded_interrupts():
    """Undoes what a shell does for jobs in the background: they and their children ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_waiting(kind, recipe, heeded_interrupts):
    """Also while a name is being resolved, which no timeout of a socket ends."""
    script = (
        "import socket, sys, time\n"
        "socket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"
        "from nvae_tf.training.rendezvous import wait_for_all\n"
        f"wait_for_all({addresses(2)!r}, 0, 60.0)"
    )
    words = [sys.executable, "-u", "-c", script]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"waiting for worker 1")
    begin = time.monotonic()
    process.send_signal(kind)
    process.communicate(timeout=10)
    assert time.monotonic() - begin < 2.0
    assert process.returncode == -kind  # Python ends itself by an interrupt that nothing handles


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_the_command_waits(kind, recipe, tmp_path, heeded_interrupts):
    cluster = {"cluster": {"worker": addresses(2)}, "task": {"type": "worker", "index": 0}}
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "train_keras.py", "--config", recipe, "--root", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TF_CONFIG": json.dumps(cluster)},
    )  # fmt: skip
    assert process.stdout.readline().startswith("waiting for worker 1")
    begin = time.monotonic()
    process.send_signal(kind)
    process.communicate(timeout=20)
    assert time.monotonic() - begin < 5.0
    # 75 is the status of a training that was stopped early.
    assert process.returncode == (75 if kind is signal.SIGTERM else 130)


def test_visitors_do_no_harm():
    """Port scanners, browsers, and as many silent clients as are answered at once."""
    hosts = addresses(2)
    lines, visitors = [], []
    chief = threading.Thread(target=lambda: lines.extend(meet([hosts])))
    chief.start()
    time.sleep(0.3)
    where = ("127.0.0.1", int(hosts[0].rpartition(":")[2]))
    for number in range(rendezvous.MOST_TALKS - 1):  # these hold their places for TALK_SECONDS
        visitors.append(socket.create_connection(where))
        if number % 2:
            visitors[-1].sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[: number % 27])
    rest = meet([hosts], numbers=(1,))
    chief.join(60.0)
    for visitor in visitors:
        visitor.close()
    assert lines + rest == [None, None]
    assert_free(hosts)


WHOLE = b"nvae-tf-meeting 1 0123456789abcdef 1 0123456789abcdef met \n"
damaged_lines = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda cut, more: WHOLE[:cut] + more, st.integers(0, len(WHOLE)), st.binary()),
    st.builds(
        lambda number, state, text: f"nvae-tf-meeting 1 a {number} b {state} {text}\n".encode(
            errors="replace"
        ),
        st.integers(),
        st.sampled_from(["met", "go", "refused", "waiting"]),
        st.text(),
    ),
)


@pytest.fixture(scope="module")
def waiting():
    """A worker that waits, and its addresses."""
    hosts = addresses(2)
    with rendezvous._talking(hosts, 0) as meeting:
        yield hosts, meeting


@given(damaged_lines)
def test_inputs_of_any_bytes(waiting, content):
    hosts, meeting = waiting
    with socket.create_connection(("127.0.0.1", int(hosts[0].rpartition(":")[2]))) as visitor:
        visitor.sendall(content)
        visitor.shutdown(socket.SHUT_WR)
        visitor.settimeout(5.0)
        with contextlib.suppress(ConnectionResetError):  # it had not read everything
            while visitor.recv(10_000):
                pass
    assert not meeting.problem and not meeting._heard and not meeting._told
    decoded = rendezvous._decode(content)
    assert decoded is None or "\n" not in decoded.text


@given(st.text(max_size=5000), st.sampled_from([rendezvous.MET, rendezvous.REFUSED]))
def test_inputs_that_are_encoded_are_decoded(text, state):
    message = rendezvous._Message("ab", 7, "cd", state, text)
    line = message.encode()
    assert len(line) <= rendezvous.LONGEST and line.count(b"\n") == 1
    assert rendezvous._decode(line)[:4] == message[:4]
