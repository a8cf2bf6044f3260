"""Standard error of commands: TensorFlow's chatter is kept out, and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvae_tf.cli import chatter
from nvae_tf.cli.chatter import is_chatter

pytestmark = pytest.mark.core

ABSL = "{}0000 00:00:1795626567.373847    4819 {}"
OLDER = "2024-12-01 10:00:00.123456: {} tensorflow/core/{}"


def absl(level: str, text: str) -> str:
    return ABSL.format(level, text)


NOTICES = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    absl("I", "port.cc:153] oneDNN custom operations are on. You may see slightly different results."),
    absl("I", "gpu_device.cc:2020] Created device /job:localhost/replica:0/task:0/device:GPU:0"),
    absl("E", "cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: Failed call to "
         "cuInit: UNKNOWN ERROR (303)"),
    absl("E", "util.cc:131] oneDNN supports DT_INT32 only on platforms with AVX-512. Falling back."),
    absl("E", "cuda_dnn.cc:8579] Unable to register cuDNN factory: Attempting to register factory"),
    absl("W", "computation_placer.cc:177] computation placer already registered."),
    absl("W", "op_kernel.cc:1858] OP_REQUIRES failed at save_restore_v2_ops.cc:163 : OUT_OF_RANGE"),
    absl("W", "gpu_timer.cc:114] Skipping the delay kernel, measurement accuracy will be reduced"),
    OLDER.format("E", "stream_executor_internal.h:177] SetPriority unimplemented for this stream."),
    OLDER.format("I", "platform/cpu_feature_guard.cc:182] This TensorFlow binary is optimized"),
    OLDER.format("E", "cuda/cuda_driver.cc:282] failed call to cuInit: CUDA_ERROR_NO_DEVICE: no "
                 "CUDA-capable device is detected"),
    "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with "
    "the appropriate compiler flags.",
]  # fmt: skip

WORDS = [
    "error: ours",
    "Traceback (most recent call last):",
    "I0000 is how a message begins, but this is none",
    absl("F", "parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --nonsense"),
    absl("W", "gpu_device.cc:2433] Cannot dlopen some GPU libraries."),
    absl(
        "E", "cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: CUDA_ERROR_UNKNOWN"
    ),
    absl("E", "stream.cc:9] an illegal memory access was encountered"),
    OLDER.format("E", "framework/node_def_util.cc:675] out of memory"),
    "ptxas fatal   : Value 'sm_99' is not defined",
]


@pytest.mark.parametrize("line", NOTICES)
def test_notices_are_chatter(line):
    assert is_chatter(line.encode())


@pytest.mark.parametrize("line", WORDS)
def test_everything_else_is_not(line):
    assert not is_chatter(line.encode())


BEGIN = "import os, sys, time, threading\nfrom nvae_tf.cli.chatter import keep_out\nkeep_out()\n"


def run(script: str, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != chatter.LEVEL}
    environment.update(options.pop("env", {}))
    return subprocess.run(
        [sys.executable, "-c", BEGIN + script],
        capture_output=True, text=True, check=False, env=environment, **options,
    )  # fmt: skip


def writing(*lines: str) -> str:
    """A script that writes lines to file descriptor 2, as C++ code does."""
    return f"for line in {lines!r}: os.write(2, line.encode() + b'\\n')\n"


def test_a_process_hands_on_all_but_chatter():
    done = run(writing(*NOTICES[:3], WORDS[0], *NOTICES[3:], *WORDS[1:]))
    assert done.stderr.splitlines() == WORDS


def test_nothing_is_kept_out_where_the_user_chose_a_level():
    done = run(writing(*NOTICES, *WORDS), env={chatter.LEVEL: "0"})
    assert done.stderr.splitlines() == NOTICES + WORDS


def test_last_words_of_an_abort_are_handed_on():
    text = "terminate called after throwing an instance of 'std::system_error'"
    done = run(writing(*NOTICES) + f"os.write(2, {text.encode()!r}); os.abort()")
    assert done.returncode < 0 and done.stderr == text


def test_many_threads_and_long_lines_come_through_whole():
    script = (
        "def write(name):\n"
        "    for number in range(300): os.write(2, b'%d %d %s\\n' % (name, number, b'x' * 2000))\n"
        "threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "os.write(2, b'y' * 1_000_000 + b'\\n')"
    )
    lines = run(script).stderr.splitlines()
    assert len(lines) == 4 * 300 + 1 and len(lines[-1]) == 1_000_000
    for name in range(4):
        thread_lines = [line for line in lines if line.startswith(f"{name} ")]
        assert thread_lines == [f"{name} {number} {'x' * 2000}" for number in range(300)]


def test_the_lines_of_children_are_filtered_too():
    child = f"import os; os.write(2, {(NOTICES[1] + chr(10) + WORDS[0]).encode()!r})"
    script = f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])\n"
    assert run(script).stderr == WORDS[0]


def test_pythons_own_standard_error_stays_a_terminal():
    import pty

    leader, follower = pty.openpty()
    script = "print(sys.stderr.isatty(), os.isatty(2)); print('ours', file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], stdout=subprocess.PIPE, stderr=follower, check=True,
        env={k: v for k, v in os.environ.items() if k != chatter.LEVEL},
    )  # fmt: skip
    os.close(follower)
    assert done.stdout == b"True False\n"
    assert os.read(leader, 100) == b"ours\r\n"
    os.close(leader)


def test_a_closed_standard_error_stays_closed():
    script = "print(sys.stderr)\ntry: os.fstat(2)\nexcept OSError: print('closed')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, BEGIN + script],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["None", "closed"]


def within_a_minute(condition) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_no_process_is_left_even_by_one_that_is_killed(tmp_path):
    def filters():
        names = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if str(tmp_path / "chatter.py").encode() in words:
                names.append(path.parent.name)
        return names

    # A copy, so that the processes of other tests are not taken for this one's.
    (tmp_path / "chatter.py").write_text(Path(chatter.__file__).read_text())
    script = "import sys; sys.path.insert(0, sys.argv[1]); import chatter; chatter.keep_out()\n"
    script += "print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != chatter.LEVEL},
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    assert within_a_minute(lambda: len(filters()) == 1)
    process.kill()
    process.communicate()
    assert within_a_minute(lambda: not filters())
