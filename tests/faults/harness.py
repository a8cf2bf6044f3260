"""Shared by the fuzz tests: the verdict on one case, and ways to damage bytes."""

import contextlib
import io
import resource
import traceback

from hypothesis import strategies as st

from nvae_tf.io.errors import UserError

MAX_MEMORY = 2**30  # bytes that the cases of one test may add to the process's peak


class Counts:
    """Counts of the accepted and the refused cases of a test."""

    def __init__(self):
        self.accepted = self.refused = 0
        self._peak = _peak()

    def __str__(self):
        return f"{self.accepted + self.refused} cases, {self.refused} refused"

    def check(self, call):
        """Tries a case, which has to succeed or to be refused in one line.

        Returns its result, or the `UserError`. Anything else that is raised fails the test; so does
        memory beyond the bound.
        """
        try:
            result = call()
            self.accepted += 1
        except UserError as error:
            result = error
            self.refused += 1
        assert _peak() - self._peak < MAX_MEMORY, "memory"
        return result

    def check_command(self, main, arguments):
        """Tries a command, which has to end with status 0, or with 2 and one line."""
        errors, outputs = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(outputs):
            try:
                status = main(arguments)
            except SystemExit as end:
                status = end.code or 0
            except Exception:  # noqa: BLE001 - shown, with the arguments, by the assertion below
                status = traceback.format_exc()
        text = errors.getvalue()
        assert status in (0, 2), (arguments, status)
        assert status == 0 or (text.startswith("error: ") and text.count("\n") == 1), text
        assert "Traceback" not in text
        self.accepted += status == 0
        self.refused += status == 2
        return text


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@st.composite
def damaged(draw, whole: bytes, tokens=()):
    """The bytes of a good file with some changed, left out, put in or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "remove", "insert", "number"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut" and draw(st.booleans()):
            del content[at:]
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            more = st.binary(max_size=64)
            content[at:at] = draw(st.one_of(more, st.sampled_from(tokens)) if tokens else more)
        elif kind == "number":  # a large or negative one, in either order of bytes
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)]))
            content[at : at + size] = number.to_bytes(
                size, draw(st.sampled_from(["little", "big"]))
            )
    return bytes(content)
