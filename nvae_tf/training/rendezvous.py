"""Waits until all workers of a cluster have started and reach each other.

TensorFlow waits for workers for an hour without a word, and neither Ctrl-C nor SIGTERM ends that. So
workers meet here first: each listens on its own address and asks the others at theirs, and TensorFlow,
which listens on the same addresses, is started once all are known to have reached all.

A question and its answer are one line each. A line says which worker speaks (its index, a random token
of its process, a hash of all addresses) and how far that worker is:

- ``waiting``: it has not reached all others yet; a text says which, and why;
- ``met``: it has reached all others, and each was the one expected at its address;
- ``go``, from the chief only: all have met. A worker that hears this leaves. The chief leaves when all
  others have confirmed that they heard it, so nobody stops listening while another needs an answer;
- ``refused``: it ends; a text gives the reason, which the others then report, too.

Lines of another form, lines that are too long and connections that are too slow are ignored.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import socket
import threading
import time
from typing import NamedTuple

from nvae_tf.io.errors import UserError, one_line, short_message

JOIN_SECONDS = 600  # how long workers wait for each other
RETRY_SECONDS = 0.5
TALK_SECONDS = 5.0  # time limit for a connection, and for each line
CONFIRM_SECONDS = 60.0  # how long a worker that has been answered may stall before it confirms that
FRESH_SECONDS = 15.0  # after which a worker that has met counts as gone unless it is heard again
PATIENCE_SECONDS = 2.0  # time before this worker prints for whom it waits
TELL_SECONDS = 5.0  # how long a worker that ends stays to say why
CHIEF = 0
MOST_TALKS = 256  # connections that are answered at the same time, at most
MOST_NAMED = 5  # workers that a message names, at most
LONGEST = 4096  # bytes of a line, at most

MAGIC, VERSION = "nvae-tf-meeting", "1"
RECEIVED = b"+"  # what a worker sends when it has read an answer
WAITING, MET, GO, REFUSED, OTHER_VERSION = "waiting", "met", "go", "refused", "other-version"


def wait_for_all(hosts: list[str], worker: int, seconds: float) -> None:
    """Returns once all workers have reached each other.

    Args:
        hosts: ``host:port`` of all workers.
        worker: This worker's index.
        seconds: Seconds to wait at most.

    Raises:
        UserError: After that time a worker is missing or cannot reach another one; another process
            answers in a worker's place; a worker refuses; or this worker's own port is taken.
    """
    with _talking(hosts, worker) as meeting:
        meeting.wait(seconds)
        if meeting.problem:
            meeting.tell(TELL_SECONDS)
            raise UserError(meeting.problem)


def tell_others(hosts: list[str], worker: int, reason: str, seconds: float) -> None:
    """Meets the other workers only to say why this one ends.

    Args:
        hosts: ``host:port`` of all workers.
        worker: This worker's index.
        reason: The reason, as the others report it.
        seconds: Seconds to wait at most until all have heard it.

    Raises:
        UserError: This worker's own port is taken, or an address is malformed.
    """
    with _talking(hosts, worker) as meeting:
        meeting.refuse(reason)
        meeting.tell(seconds)


class _Message(NamedTuple):
    """A line of the protocol, in which a worker speaks about itself.

    Attributes:
        cluster: Hash of all addresses that the worker was started with.
        number: The worker's index.
        token: Random token that identifies the worker's process.
        state: How far the worker is: one of `WAITING`, `MET`, `GO`, `REFUSED`.
        text: For whom the worker waits, or why it refuses.
    """

    cluster: str
    number: int
    token: str
    state: str
    text: str = ""

    def encode(self) -> bytes:
        words = (MAGIC, VERSION, self.cluster, str(self.number), self.token, self.state)
        line = f"{' '.join(words)} {one_line(self.text)}"
        return line.encode(errors="backslashreplace")[: LONGEST - 1] + b"\n"


def _decode(line: bytes) -> _Message | None:
    """Decodes a line; None if it does not belong to this protocol."""
    if len(line) > LONGEST or not line.endswith(b"\n"):
        return None
    magic, _, rest = line.decode(errors="ignore").removesuffix("\n").partition(" ")
    version, _, rest = rest.partition(" ")
    if magic != MAGIC:
        return None
    if version != VERSION:
        return _Message("", -1, "", OTHER_VERSION)
    cluster, number, token, state, text, *_ = (*rest.split(" ", 4), "", "", "", "", "")
    if not (number.isascii() and number.isdigit() and len(number) < 7 and token):
        return None
    if state not in (WAITING, MET, GO, REFUSED):
        return None
    return _Message(cluster, int(number), token, state, one_line(text))


def _read(connection: socket.socket) -> bytes:
    """Reads a line, or its beginning if it is too long or the connection ends.

    Raises:
        TimeoutError: Reading takes longer than `TALK_SECONDS`.
    """
    end, line = time.monotonic() + TALK_SECONDS, b""
    while b"\n" not in line and len(line) < LONGEST:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        block = connection.recv(LONGEST - len(line))
        if not block:
            break
        line += block
    return line


class _Heard(NamedTuple):
    """The last message of another worker, and the time at which it came."""

    state: str
    text: str
    time: float


class _Meeting:
    """This worker's knowledge about the others, which its threads update under one lock.

    Args:
        hosts: ``host:port`` of all workers.
        worker: This worker's index.
    """

    def __init__(self, hosts: list[str], worker: int):
        self._hosts, self._worker = hosts, worker
        self._cluster = hashlib.sha256("\n".join(hosts).encode(errors="replace")).hexdigest()[:16]
        self._token = secrets.token_hex(8)
        self._others = {number for number in range(len(hosts)) if number != worker}
        self._changed = threading.Condition()
        self._state = WAITING
        self._missing = dict.fromkeys(self._others, "not reached yet")  # worker -> reason
        self._heard: dict[int, _Heard] = {}
        self._told: set[int] = set()  # workers that know that this one says "go" or refuses
        self._whom = self._others  # workers that have to be told if this one refuses
        self._stranger = ""  # a process that asked, but was started with other addresses
        self._for_others = ""  # why this worker ends, as the others report it
        self._over = False
        self._talks = threading.BoundedSemaphore(MOST_TALKS)
        self.problem = ""  # why this worker ends, as it reports it itself

    def wait(self, seconds: float) -> None:
        """Waits until all have met, or until there is a `problem`.

        Args:
            seconds: Seconds after which a missing worker becomes the problem.
        """
        begin, said = time.monotonic(), False
        with self._changed:
            while not self.problem and not self._complete():
                waited = time.monotonic() - begin
                if waited >= seconds:
                    self._whom = set(self._heard)  # nobody else can be told
                    self._refuse(
                        f"{self._awaited()} did not join within {seconds:g} seconds{self._stranger}; "
                        "start all workers, with the same addresses, or wait longer with --join_timeout"
                    )
                elif waited >= PATIENCE_SECONDS and not said:
                    print(f"waiting for {self._awaited()}", flush=True)
                    said = True
                else:
                    self._changed.wait(min(RETRY_SECONDS, seconds - waited))

    def refuse(self, reason: str) -> None:
        """Ends the meeting because of a problem of this worker.

        Args:
            reason: The problem.
        """
        with self._changed:
            self._refuse(reason)

    def tell(self, seconds: float) -> None:
        """Waits until the others know why this worker ends.

        Args:
            seconds: Seconds to wait at most.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._told >= self._whom, seconds)

    def end(self) -> None:
        """Asks the threads to end, which they do at their next check."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def answer_all(self, listener: socket.socket) -> None:
        """Answers every connection until the meeting ends; runs in a thread.

        Args:
            listener: The socket of this worker's address.
        """
        listener.settimeout(RETRY_SECONDS / 5)  # so that the end is noticed
        while not self._over:
            try:
                connection, (address, *_) = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # too many open files, or a connection that has already ended
                time.sleep(RETRY_SECONDS / 5)
                continue
            if self._talks.acquire(blocking=False):
                _start_thread(self._answer, connection, address)
            else:
                connection.close()

    def keep_asking(self, number: int) -> None:
        """Asks another worker repeatedly until the meeting ends; runs in a thread.

        Resolving a name may take long, and a socket's timeout does not limit it. So this does not run
        in the main thread, which signals have to interrupt.

        Args:
            number: The other worker's index.
        """
        while True:
            with self._changed:
                if self._over:
                    return
                wanted, question = self._wants(number), self._message()
            if wanted:
                self._ask(number, question)
            with self._changed:
                self._changed.wait_for(lambda: self._over, RETRY_SECONDS)

    def _complete(self) -> bool:
        """Whether this worker may leave because all have met. Also updates this worker's state."""
        if self._worker == CHIEF:
            if self._state == WAITING and not self._missing and not self._behind():
                self._state = GO
                self._told.clear()
            return self._state == GO and self._told == self._others
        if self._state != GO:
            self._state = WAITING if self._missing else MET
        return self._state == GO

    def _behind(self) -> list[int]:
        """The workers that have not recently told the chief that they have reached all others."""
        oldest = time.monotonic() - FRESH_SECONDS
        heard = self._heard
        return [
            number
            for number in sorted(self._others)
            if number not in heard or heard[number].state != MET or heard[number].time < oldest
        ]

    def _awaited(self) -> str:
        """The workers that this one waits for, as part of a line."""
        if self._missing:
            return "worker " + _listed(
                [f"{n} ({self._hosts[n]}: {why})" for n, why in sorted(self._missing.items())]
            )
        if self._worker != CHIEF:
            behind = [CHIEF]
        else:
            behind = self._behind() or sorted(self._others - self._told)
        names = []
        for number in behind:
            waits_for = self._heard[number].text if number in self._heard else ""
            what = f"it waits for {waits_for}" if waits_for else "it answers, but does not go on"
            names.append(f"{number} ({self._hosts[number]}: {what})")
        return "worker " + _listed(names)

    def _message(self) -> _Message:
        text = self._for_others if self._state == REFUSED else ""
        if self._state == WAITING:
            text = self._awaited()
        return _Message(self._cluster, self._worker, self._token, self._state, text)

    def _refuse(self, reason: str, for_others: str | None = None) -> None:
        if self.problem:
            return
        here = f"worker {self._worker} ({self._hosts[self._worker]})"
        self.problem, self._for_others = reason, for_others or f"{here} refused: {reason}"
        self._state = REFUSED
        self._told.clear()
        self._changed.notify_all()

    def _hear(self, message: _Message) -> None:
        """Records a message of another worker of this cluster."""
        self._heard[message.number] = _Heard(message.state, message.text, time.monotonic())
        if message.state == REFUSED and not self.problem:
            self._whom = set(self._heard)
            self._refuse(message.text, for_others=message.text)
        self._changed.notify_all()

    def _wants(self, number: int) -> bool:
        """Whether another worker has to be asked now."""
        if self._state == REFUSED:
            return number not in self._told
        if self._state == GO:
            return False
        return (
            number in self._missing
            or number == CHIEF
            or (self._worker == CHIEF and number in self._behind())
        )

    def _ask(self, number: int, question: _Message) -> None:
        try:
            with socket.create_connection(
                host_and_port(self._hosts[number]), TALK_SECONDS
            ) as connection:
                if connection.getsockname() == connection.getpeername():
                    # Nobody listens there, and the system chose that port for this side as well.
                    raise ConnectionRefusedError(
                        errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)
                    )
                connection.sendall(question.encode())
                line = _read(connection)
                answer = _decode(line)
                with self._changed:
                    self._judge(number, question, line, answer)
                if answer:
                    with contextlib.suppress(OSError):
                        connection.sendall(RECEIVED)
        except (OSError, ValueError) as error:  # ValueError: the name cannot be one of a host
            with self._changed:
                self._missing[number] = short_message(error)
                refused = isinstance(error, ConnectionRefusedError) and number in self._heard
                if refused and self._state == REFUSED:
                    self._told.add(number)  # it has ended, so that it cannot be told anything
                self._changed.notify_all()

    def _judge(self, number: int, question: _Message, line: bytes, answer: _Message | None) -> None:
        """Interprets an answer from the address of a worker."""
        host = self._hosts[number]
        if answer is None:
            self._missing[number] = (
                "the program that answers there is not a worker" if line else "no answer"
            )
        elif answer.token == self._token:
            self._refuse(
                f"the address of worker {number} ({host}) leads to this process, which is worker "
                f"{self._worker}; correct the index of this task, or the machine's entry for that name"
            )
        elif answer.state == OTHER_VERSION:
            self._refuse(
                f"worker {number} ({host}) has another version of nvae-tf; install the same on all"
            )
        elif answer.cluster != self._cluster:
            self._refuse(
                f"worker {number} ({host}) was started with other addresses than this one, or in "
                f"another order (here: {_listed(self._hosts)}); give all workers the same"
            )
        elif answer.number != number:
            self._refuse(
                f"worker {answer.number} answers at the address of worker {number} ({host}); correct "
                "the index of the task there, or the machine's entry for that name"
            )
        else:
            self._missing.pop(number, None)
            if question.state == REFUSED:
                self._told.add(number)
            self._hear(answer)
            if answer.state == GO and question.state == MET:
                self._state = GO
        self._changed.notify_all()

    def _answer(self, connection: socket.socket, address: str) -> None:
        try:
            with connection:
                question = _decode(_read(connection))
                if question is None:
                    return
                with self._changed:
                    ours = question.cluster == self._cluster and question.number in self._others
                    if ours:
                        self._hear(question)
                    elif question.token != self._token:
                        self._stranger = (
                            f" ({address} asked, but has other addresses or a wrong index)"
                        )
                    answer = self._message()
                connection.sendall(answer.encode())
                # One that has heard "go" does not ask again, so its confirmation must not be missed.
                connection.settimeout(CONFIRM_SECONDS if ours else TALK_SECONDS)
                received = connection.recv(1) == RECEIVED
        except OSError:
            return
        finally:
            self._talks.release()
        with self._changed:
            going = answer.state == GO and question.state == MET
            if ours and received and (going or answer.state == REFUSED):
                self._told.add(question.number)
                self._changed.notify_all()


@contextlib.contextmanager
def _talking(hosts: list[str], worker: int):
    """Yields a meeting whose threads are running; afterwards the port is free again."""
    for host in hosts:
        host_and_port(host)
    meeting = _Meeting(hosts, worker)
    with listening(hosts[worker]) as listener:
        answering = _start_thread(meeting.answer_all, listener)
        try:
            for number in range(len(hosts)):
                if number != worker:
                    _start_thread(meeting.keep_asking, number)
            yield meeting
        finally:
            meeting.end()
            answering.join()  # otherwise the port would stay taken


def _start_thread(function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


@contextlib.contextmanager
def listening(address: str):
    """Yields a socket that listens on a worker's own port.

    Raises:
        UserError: The port cannot be listened on, or the address is malformed.
    """
    _, port = host_and_port(address)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=4096
        )
    except OSError as error:
        raise UserError(
            f"{address}: this worker cannot listen there ({error.strerror}); end the program that "
            "has the port, or name another one in TF_CONFIG, which wins over Slurm's variables"
        ) from None
    with listener:
        yield listener


def host_and_port(address: str) -> tuple[str, int]:
    """Splits a worker's address ``host:port``.

    Raises:
        UserError: The address is malformed.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        raise UserError(
            f"TF_CONFIG: {address!r} is not the address of a worker; expected host:port"
        )
    return host.strip("[]"), int(port)
