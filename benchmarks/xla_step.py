#!/usr/bin/env python3
"""A training step as one XLA program: written on a machine with TensorFlow, measured on one with JAX.

python benchmarks/xla_step.py export --config cifar10 --precision mixed_bfloat16 cifar10.step
python benchmarks/xla_step.py run cifar10.step --repeat 20

`export` needs no GPU; every key of a recipe is a flag. `run` needs JAX and NumPy, and neither
TensorFlow nor this package. It uses private parts of JAX: tried with version 0.10.2. Both draw the
step's inputs, weights included, from one seed. For models and batches that are small enough the file
holds losses that TensorFlow computed, and `run` exits with 1 if its own differ.
"""

import argparse
import collections
import dataclasses
import json
import lzma
import math
import re
import statistics
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

FORMAT, VERSION = "nvae-tf training step", 1
DESCRIBED = (
    "config", "recipe", "batch_size", "precision", "parameters", "inputs", "replaced", "reported",
    "losses",
)  # fmt: skip
SEED = 0
COMPARED_STEPS = 3  # in float32; in half precision one, after which steps differ too much
LEARNING_RATE = 1e-4  # low, or what libraries round differently would grow from step to step
SMALL_BATCH = 8 * 32 * 32  # pixels of a batch up to which TensorFlow computes losses, too
# The largest relative difference of a loss. Other libraries round half precision at other places.
TOLERANCES = {"float32": 1e-4, "mixed_bfloat16": 2e-2, "mixed_float16": 1e-2}
GIB = 2.0**30
LARGEST_ABOUT, LARGEST_PROGRAM = 2**24, 2**31  # bytes


class StepError(Exception):
    """What is wrong with a file, a device or a result: one line."""


# Both sides


def draw_inputs(about: dict):
    """The program's inputs, one after the other.

    Args:
        about: The description in the file. An input is constant, or uniform with a mean and a standard
            deviation; images are uniform in [0, 1), or 0 or 1.

    Yields:
        NumPy arrays.
    """
    generator = np.random.default_rng(SEED)
    for entry in about["inputs"]:
        shape, kind = entry["shape"], np.dtype(entry["dtype"])
        if "constant" in entry:
            yield np.full(shape, entry["constant"], kind)
            continue
        values = generator.random(shape, np.float32)
        if entry.get("binary"):
            values = np.round(values)
        elif "stddev" in entry:
            values = (values - 0.5) * (math.sqrt(12.0) * entry["stddev"]) + entry["mean"]
        yield values.astype(kind)


# Export: with TensorFlow


def export(words: list[str]) -> int:
    """Writes a recipe's step to a file.

    Args:
        words: The command line after ``export``.
    """
    from measuring import fresh_model, make_parser, run

    parser = make_parser("Write a recipe's training step as an XLA program.")
    parser.prog += " export"
    parser.add_argument("out", metavar="OUT", help="file to write")
    parser.add_argument(
        "--platform", choices=("GPU", "CPU"), default="GPU", help="what for (default: GPU)"
    )

    def measure(config, arguments):
        from nvae_tf.model import NVAE
        from nvae_tf.training.optimizer_choice import make_optimizer
        from nvae_tf.training.programs import flat_step, lower
        from nvae_tf.training.trainer import Trainer

        class XlaNoiseNVAE(NVAE):
            """A model whose noise is XLA's everywhere; TensorFlow's is another from the same seed."""

            def draw_noise(self, indices, seed):
                return xla_noise(super().draw_noise)(indices, seed)

        model = fresh_model(config, XlaNoiseNVAE)

        def make_trainer(jit_compile):
            settings = dataclasses.replace(config.train, jit_compile=jit_compile)
            optimizer = make_optimizer(settings, LEARNING_RATE)
            on_gpu = arguments.platform == "GPU"
            return Trainer(model, settings, 1000, optimizer=optimizer, on_gpu=on_gpu)

        trainer = make_trainer("on")
        batch = config.data.batch_size * config.train.accumulate_steps
        begin = time.perf_counter()
        step = flat_step(trainer, batch)
        program = lower(step.function, step.specs, arguments.platform)
        seconds = time.perf_counter() - begin
        pixels = batch * math.prod(model.image.shape[:2])
        about = dict(
            format=FORMAT, version=VERSION, config=config.to_dict(), recipe=arguments.config,
            batch_size=batch, precision=config.train.precision, platform=arguments.platform,
            parameters=model.num_parameters, inputs=_inputs(trainer, step.specs[-1]),
            replaced=len(step.specs) - 1, reported=step.reported, losses=None,
        )  # fmt: skip
        if pixels <= SMALL_BATCH:
            about["losses"] = _tensorflow_losses(flat_step(make_trainer("off"), batch), about)
        size = write(arguments.out, about, program)
        return {
            "parameters": model.num_parameters,
            "lowering_seconds": round(seconds, 2),
            "program_bytes": len(program),
            "file_bytes": size,
            "convolutions": program.count(b"convolution"),
            "batch_size": batch,
            "precision": config.train.precision,
            "losses": about["losses"],
        }

    return run(parser, measure, words)


def xla_noise(draw):
    """A function that draws noise, compiled with XLA."""
    import tensorflow as tf

    return tf.function(draw, autograph=False, jit_compile=True)


def _inputs(trainer, images) -> list[dict]:
    """How each input is drawn: with the mean and deviation of its variable's first value."""
    entries = []
    for variable in trainer.changed_variables:
        value = variable.read_value().numpy()
        entry = {"shape": value.shape, "dtype": value.dtype.name}
        if value.size == 0 or np.all(value == value.flat[0]):
            entry["constant"] = value.flat[0].item() if value.size else 0
        else:
            entry.update(mean=float(value.mean()), stddev=float(value.std()))
        entries.append(entry)
    binary = bool(trainer.model.image.binary)
    return [*entries, {"shape": images.shape.as_list(), "dtype": "float32", "binary": binary}]


def _tensorflow_losses(step, about: dict) -> list[float]:
    """The losses of a few steps, with TensorFlow's own operations on this machine's CPU."""
    import tensorflow as tf

    from nvae_tf.training.steps import grappler_disabled

    run, losses = tf.function(step.function, autograph=False), []
    *values, images = map(tf.constant, draw_inputs(about))
    with grappler_disabled():
        for _ in range(COMPARED_STEPS if about["precision"] == "float32" else 1):
            outputs = run(*values, images)
            values, reported = outputs[: len(values)], outputs[len(values) :]
            losses.append(float(reported[step.reported.index("loss")]))
    return losses


def write(path: str, about: dict, program: bytes) -> int:
    """Writes a description and a program, and returns the size of the file."""
    from nvae_tf.io.files import atomic_write
    from nvae_tf.io.paths import user_path

    with atomic_write(user_path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr("about.json", json.dumps(about))
        archive.writestr("program.hlo.xz", lzma.compress(program))
    return user_path(path).stat().st_size


# Run: with JAX


def read(path: str) -> tuple[dict, bytes]:
    """A description and a program.

    Raises:
        StepError: The file is missing, damaged, or of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("about.json").file_size > LARGEST_ABOUT:
                raise ValueError("its description is too large")
            about = json.loads(archive.read("about.json"))
            if about["format"] != FORMAT:
                raise ValueError("it is something else")
            missing = [key for key in DESCRIBED if key not in about]
            if about["version"] != VERSION:
                raise StepError(
                    f"{path}: a step of version {about['version']}, and this script reads version "
                    f"{VERSION}; export it again"
                )
            if missing:
                raise ValueError(f"its description lacks {missing[0]}")
            decompressor = lzma.LZMADecompressor()
            program = decompressor.decompress(archive.read("program.hlo.xz"), LARGEST_PROGRAM)
            if not decompressor.eof:
                raise ValueError("its program is too large or cut short")
    except OSError as error:
        raise StepError(f"{path}: {error.strerror or error}") from None
    # The archive's own errors are RuntimeError, if it says that it is encrypted, or others.
    except (
        ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, lzma.LZMAError,
    ) as error:  # fmt: skip
        raise StepError(f"{path}: not a step, or damaged ({error}); export it again") from None
    return about, program


class Step:
    """A compiled step on one device.

    Args:
        about: The description.
        program: XLA's `HloModuleProto`, serialized.

    Raises:
        StepError: JAX cannot read or compile it.
    """

    def __init__(self, about: dict, program: bytes):
        import jax

        try:
            from jax._src.interpreters import mlir
            from jaxlib import _jax

            jax.config.update("jax_enable_x64", True)
            self.device, self.about = jax.devices()[0], about
            module = _jax.mlir.hlo_to_stablehlo(program)
            code = _donating(module, about["replaced"], len(about["inputs"]), mlir)
            begin = time.perf_counter()
            self._executable = self.device.client.compile_and_load(
                code, _jax.DeviceList((self.device,)), _jax.CompileOptions()
            )
            self.compile_seconds = time.perf_counter() - begin
        except (ImportError, ValueError, RuntimeError, AttributeError) as error:
            raise StepError(_compile_error(error, jax.__version__)) from None
        self.memory = self._executable.get_compiled_memory_stats()

    @property
    def needed_bytes(self) -> int:
        """Memory that a step takes at its peak, donated inputs counted once."""
        memory = self.memory
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes

    def __call__(self, state: list, images) -> tuple[list, list]:
        """The next state and what is reported; the state that is given is used up."""
        results = self._executable.execute_sharded([*state, images])
        outputs = [one for (one,) in results.disassemble_into_single_device_arrays()]
        count = self.about["replaced"]
        return outputs[:count], outputs[count:]

    def operations(self) -> dict[str, str]:
        """The category of each operation of the compiled program, by its name."""
        (module,) = self._executable.hlo_modules()
        return categories(module.to_string())


def _donating(module: bytes, replaced: int, inputs: int, mlir) -> bytes:
    """The module with every input donated that an output replaces."""
    from jaxlib.mlir import ir

    with mlir.make_ir_context(), ir.Location.unknown():
        parsed = ir.Module.parse(module)
        function = ir.SymbolTable(parsed.operation)["main"]
        if len(function.type.inputs) != inputs:
            raise ValueError(f"{len(function.type.inputs)} inputs instead of {inputs}")
        number = ir.IntegerType.get_signless(32)
        function.attributes["arg_attrs"] = ir.ArrayAttr.get(
            [
                ir.DictAttr.get(
                    {"tf.aliasing_output": ir.IntegerAttr.get(number, place)}
                    if place < replaced
                    else {}
                )
                for place in range(inputs)
            ]
        )
        return mlir.module_to_bytecode(parsed)


def _compile_error(error: Exception, version: str) -> str:
    text = " ".join(str(error).split())[:300]
    if "RESOURCE_EXHAUSTED" in text:
        return f"the device has too little memory to compile the step ({text})"
    return (
        f"JAX {version} cannot compile the step ({type(error).__name__}: {text}); this script was "
        "tried with 0.10.2"
    )


CATEGORIES = {
    "depthwise": r"[Dd]epthwise|feature_group_count=(?!1\b)",
    "convolutions": r"Conv2D|convolution|conv-|\bdot\(|MatMul|cudnn\$conv|gemm",
    "batch norm": r"BatchNorm|batch-norm|batch_norm",
    "collectives": r"all-reduce|Collective",
}


def categories(program: str) -> dict[str, str]:
    """What each operation of a compiled program belongs to: a name of `CATEGORIES`, or ``rest``.

    A fusion belongs to the first category that anything in it belongs to.

    Args:
        program: XLA's text of the program.
    """
    bodies, name = collections.defaultdict(list), None
    for line in program.splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ .*\{$", line):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
        elif name and " = " in line:
            bodies[name].append(line)

    def text_of(line):
        called = re.search(r"calls=%?([\w.\-]+)", line)
        return line + "\n".join(bodies.get(called[1], []) if called else [])

    category_of = {}
    for lines in bodies.values():
        for line in lines:
            operation = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
            # Loops and calls are measured again as what they consist of.
            if operation and not re.search(r" (?:while|call|conditional)\(", line):
                text = text_of(line)
                matching = [kind for kind, form in CATEGORIES.items() if re.search(form, text)]
                category_of[operation[1]] = matching[0] if matching else "rest"
    return category_of


def run(words: list[str]) -> int:
    """Compiles and measures a step, and prints the result as one line of JSON.

    Args:
        words: The command line after ``run``.
    """
    parser = argparse.ArgumentParser(
        prog="xla_step.py run", description="Run a step that was exported, with JAX."
    )
    parser.add_argument("step", metavar="FILE", help="what export wrote")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="steps (default: 20)")
    parser.add_argument(
        "--memory_gib",
        type=float,
        metavar="X",
        help="memory to keep within (default: the device's)",
    )
    parser.add_argument(
        "--profile", metavar="DIR", help="also profile some steps, with JAX's profiler into DIR"
    )
    arguments = parser.parse_args(words)
    if arguments.repeat < 1:
        parser.error("--repeat: expected at least 1")
    try:
        result = measure_step(arguments)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def measure_step(arguments) -> dict:
    """The figures of a step.

    Raises:
        StepError: The file, the device or the losses are not what they should be.
    """
    about, program = read(arguments.step)
    try:
        import jax
    except ImportError:
        raise StepError(
            'JAX is not installed; pip install jax, or "jax[cuda12]" for GPUs'
        ) from None
    step = Step(about, program)
    _check_memory(step, arguments.memory_gib)
    losses, seconds = [], []
    place = about["reported"].index("loss")
    try:
        *state, images = [jax.device_put(value, step.device) for value in draw_inputs(about)]
        compared = about["losses"] or []
        for number in range(max(arguments.repeat + 1, len(compared))):
            begin = time.perf_counter()
            state, reported = step(state, images)
            loss = float(reported[place])  # waits for the device
            if number:
                seconds.append(time.perf_counter() - begin)
            losses.append(loss)
    except (ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise StepError(f"the step failed on {step.device.device_kind} ({text})") from None
    difference, parts = _compare(losses, compared, about["precision"]), None
    if arguments.profile:
        try:
            parts = _profile(step, state, images, arguments.profile)
        except (ValueError, RuntimeError, OSError) as error:  # the other figures are there
            print(f"warning: no profile ({str(error).splitlines()[0][:300]})", file=sys.stderr)
    median, memory = statistics.median(seconds), step.memory
    return {
        "recipe": about["recipe"],
        "batch_size": about["batch_size"],
        "precision": about["precision"],
        "gradient_checkpointing": about["config"]["gradient_checkpointing"],
        "parameters": about["parameters"],
        "compile_seconds": round(step.compile_seconds, 2),
        "step_seconds": round(median, 5),
        "images_per_second": round(about["batch_size"] / median, 3),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_memory_gib": round(step.needed_bytes / GIB, 3),
        "loss": losses[0],
        "loss_difference": difference,
        "seconds_by_category": parts,
        "device": step.device.device_kind,
        "jax": jax.__version__,
    }


def _check_memory(step: Step, given: float | None) -> None:
    statistics_of = step.device.memory_stats() or {}  # None on CPUs
    limit = given * GIB if given else statistics_of.get("bytes_limit")
    if limit and step.needed_bytes > limit:
        raise StepError(
            f"the step needs {step.needed_bytes / GIB:.1f} GiB and {step.device.device_kind} has "
            f"{limit / GIB:.1f} for it; export it with a smaller --batch_size or "
            "--gradient_checkpointing cells"
        )


def _compare(losses: list[float], expected: list[float], precision: str) -> float | None:
    """The largest relative difference from TensorFlow's losses; None if there are none."""
    if not all(map(math.isfinite, losses)):
        raise StepError(f"a loss is not finite: {losses[:COMPARED_STEPS]}")
    if not expected:
        return None
    difference = max(abs(a / b - 1.0) for a, b in zip(losses, expected, strict=False))
    if difference > TOLERANCES[precision]:
        raise StepError(
            f"losses {losses[: len(expected)]} differ from TensorFlow's {expected} by "
            f"{difference:.1e}; allowed are {TOLERANCES[precision]:.0e}"
        )
    return difference


def _profile(step: Step, state: list, images, folder: str, steps: int = 3) -> dict[str, float]:
    """Seconds of a step by category, from a profile of some steps."""
    import jax
    from jax.profiler import ProfileData

    with jax.profiler.trace(folder):
        for _ in range(steps):
            state, reported = step(state, images)
        float(reported[0].sum())
    newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    kinds, totals = step.operations(), collections.Counter()
    for plane in ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op", event.name)
                if operation in kinds:
                    totals[kinds[operation]] += event.duration_ns / 1e9 / steps
    return {kind: round(totals[kind], 6) for kind in (*CATEGORIES, "rest")}


def main() -> int:
    """Runs the command."""
    commands = {"export": export, "run": run}
    if sys.argv[1:2] and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    print("usage: xla_step.py export --config NAME [...] OUT | run FILE [...]", file=sys.stderr)
    return 0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    raise SystemExit(main())
