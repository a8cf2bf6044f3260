"""What docs/serving.md shows: the export in TFLite, in ONNX, in Keras 3, and behind a server.

Converters that are not installed are skipped.
"""

import http.server
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.config import ModelConfig
from nvae_tf.evaluation import loading
from nvae_tf.evaluation.export import export
from nvae_tf.image_spec import ImageSpec
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.model import NVAE

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
SERVED_AT = "localhost:8501"
TEMPERATURE = 0.7
CLOSE = dict(atol=1e-4, rtol=0.0)

COLOURS = ModelConfig(
    num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3, num_channels_enc=8,
    num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, use_se=True, res_dist=True, num_mixture_dec=2, num_nf=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkout(run, tmp_path_factory):
    """A folder with the export that the page speaks of."""
    folder = tmp_path_factory.mktemp("checkout")
    export(loading.load(str(run)).model, {}, folder / "exported" / "digits")
    return folder


@pytest.fixture(scope="module", params=["binary", "colours with flows", "four channels"])
def exported(request, run, checkout, tmp_path_factory):
    """A model, and its SavedModel."""
    if request.param == "binary":
        return loading.load(str(run)).model, checkout / "exported" / "digits" / "1"
    image = ImageSpec(16, 16, 3)
    if request.param == "four channels":  # of 12 bits, not square
        image = ImageSpec(16, 24, 4, bits=12)
    model = NVAE(COLOURS, image)
    return model, export(model, {}, tmp_path_factory.mktemp("other"))


def generated(model, noise):
    """The images that the model itself generates from the page's noise."""
    ordered = [tf.constant(noise[f"noise_{group:02d}"]) for group in range(len(model.groups))]
    return model.render(model.top_down(FromPrior(ordered, TEMPERATURE)).parameters)


def requests(model):
    """Each signature's name, inputs, and the outputs of the model itself."""
    images = np.random.default_rng(1).integers(0, 2, (3, *model.image.shape)).astype(np.float32)
    noise = model.draw_noise(3, (1, 0))
    named = {f"noise_{group:02d}": tensor.numpy() for group, tensor in enumerate(noise)}
    one_row_of_zeros = {name: np.zeros_like(tensor[:1]) for name, tensor in named.items()}

    def encoded(noise):
        latents = model.encode(images, noise)
        outputs = {
            f"{name}_{group:02d}": getattr(latent, name)
            for group, latent in enumerate(latents)
            for name in ("z", "mean", "stddev")
        }
        return {**outputs, "kl": tf.stack([latent.kl_per_image for latent in latents], 1)}

    z = {name: value for name, value in encoded(noise).items() if name.startswith("z_")}
    yield (
        "generate",
        {"temperature": np.array(TEMPERATURE, np.float32), **named},
        {"images": generated(model, named)},
    )
    yield "encode", {"images": images, **named}, encoded(noise)
    yield "encode", {"images": images, **one_row_of_zeros}, encoded(None)
    yield (
        "decode",
        {name: value.numpy() for name, value in z.items()},
        {"images": model.decode(list(z.values()))},
    )
    yield "reconstruct", {"images": images}, {"reconstructions": model.reconstruct(images)}


def assert_close(outputs, expected):
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, err_msg=name, **CLOSE)


def require(*packages):
    """Skips the test if a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def section(title):
    """A section's shell commands, and its Python."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.S | re.M)
    commands, python = (
        "\n".join(re.findall(rf"```{kind}\n(.*?)```", text, re.S)) for kind in ("sh", "python")
    )
    return commands.splitlines(), python


def environment():
    """What every process has: the variable that chooses Keras 2 is not among it."""
    others = {name: value for name, value in os.environ.items() if "KERAS" not in name}
    return {**others, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def run_section(title, folder, address=SERVED_AT):
    """Runs a section's Python in a separate process.

    Returns:
        The images that it ends up with by name, and its noise by name.
    """
    saved = """
import numpy
names = ("images", "reconstructions", "decoded")
images = {name: globals()[name] for name in names if name in globals()}
numpy.savez("outputs.npz", **images, **noise)
"""
    program = section(title)[1].replace(SERVED_AT, address) + saved
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "outputs.npz") as file:
        noise = {name: file[name] for name in file.files if name.startswith("noise_")}
        return {name: file[name] for name in file.files if name not in noise}, noise


def converted_to_onnx(version, signature, path):
    program = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(version)]
    program += ["--tag", "serve", "--signature_def", signature, "--opset", "18"]
    done = subprocess.run(
        [*program, "--output", str(path)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not supported" not in done.stderr, done.stderr[-2000:]


def interpreter(path):
    if importlib.util.find_spec("ai_edge_litert"):
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter(str(path))
    if not hasattr(tf.lite, "Interpreter"):
        pytest.skip("neither ai_edge_litert nor TensorFlow has an interpreter for TFLite")
    return tf.lite.Interpreter(str(path))


@pytest.mark.slow
def test_tflite_runs_every_signature_but_sample(exported, tmp_path):
    model, version = exported
    for number, (signature, inputs, expected) in enumerate(requests(model)):
        converter = tf.lite.TFLiteConverter.from_saved_model(
            str(version), signature_keys=[signature]
        )
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(converter.convert())  # with built-in operations alone, or it raises
        assert_close(interpreter(path).get_signature_runner(signature)(**inputs), expected)


@pytest.mark.slow
def test_onnx_runs_every_signature_but_sample(exported, tmp_path):
    require("tf2onnx", "onnxruntime")
    import onnxruntime

    model, version = exported
    for signature, inputs, expected in requests(model):
        path = tmp_path / f"{signature}.onnx"
        if not path.exists():
            converted_to_onnx(version, signature, path)
        session = onnxruntime.InferenceSession(str(path))
        names = [output.name for output in session.get_outputs()]
        assert_close(dict(zip(names, session.run(names, inputs), strict=True)), expected)


@pytest.mark.slow
def test_the_page_s_tflite_runs(run, checkout):
    require("ai_edge_litert")
    outputs, noise = run_section("TFLite", checkout)
    expected = generated(loading.load(str(run)).model, noise)
    np.testing.assert_allclose(outputs["images"], expected, **CLOSE)


@pytest.mark.slow
def test_the_page_s_onnx_runs(run, checkout):
    require("tf2onnx", "onnxruntime")
    (command,) = [line for line in section("ONNX")[0] if line.startswith("python")]
    program = [sys.executable, *shlex.split(command)[1:]]
    subprocess.run(program, check=True, cwd=checkout, env=environment())
    outputs, noise = run_section("ONNX", checkout)
    expected = generated(loading.load(str(run)).model, noise)
    np.testing.assert_allclose(outputs["images"], expected, **CLOSE)


@pytest.mark.slow
def test_the_page_s_keras_runs(run, checkout):
    if int(importlib.metadata.version("keras").partition(".")[0]) < 3:
        pytest.skip("this is the line of Keras 2")
    outputs, noise = run_section("Keras 3", checkout)
    model = loading.load(str(run)).model
    np.testing.assert_allclose(outputs["images"], generated(model, noise), **CLOSE)
    expected = model.reconstruct(tf.round(outputs["images"]))
    np.testing.assert_allclose(outputs["reconstructions"], expected, **CLOSE)


class Server(http.server.BaseHTTPRequestHandler):
    """A SavedModel behind TensorFlow Serving's REST interface, which pip cannot install."""

    signatures: dict

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/models/digits:predict"
        signature = self.signatures[request["signature_name"]]
        specs = signature.structured_input_signature[1]
        outputs = signature(
            **{name: tf.constant(v, specs[name].dtype) for name, v in request["inputs"].items()}
        )
        lists = {name: value.numpy().tolist() for name, value in outputs.items()}
        self._answer({"outputs": lists if len(lists) > 1 else next(iter(lists.values()))})

    def do_GET(self):
        assert self.path == "/v1/models/digits/metadata"

        def described(spec):
            sides = [{"size": str(-1 if side is None else side)} for side in spec.shape]
            return {"tensor_shape": {"dim": sides}}

        inputs = {
            name: {
                "inputs": {
                    n: described(s) for n, s in signature.structured_input_signature[1].items()
                }
            }
            for name, signature in self.signatures.items()
        }
        self._answer({"metadata": {"signature_def": {"signature_def": inputs}}})

    def _answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_the_page_s_client_of_a_server_runs(run, checkout):
    loaded = tf.saved_model.load(str(checkout / "exported" / "digits" / "1"))
    handler = type("Handler", (Server,), {"signatures": loaded.signatures})
    server = http.server.HTTPServer(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"localhost:{server.server_port}"
        outputs, _ = run_section("TensorFlow Serving", checkout, address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert outputs["images"].shape == (4, 32, 32, 1)
    model = loading.load(str(run)).model
    expected = model.reconstruct(outputs["images"].round().astype(np.float32))
    np.testing.assert_allclose(outputs["decoded"], expected, **CLOSE)
    # What the page sends with curl is what the signature takes.
    (body,) = re.findall(r"curl -d '(.*?)'", PAGE.read_text("utf-8"))
    request = json.loads(body)
    taken = loaded.signatures[request["signature_name"]].structured_input_signature[1]
    assert request["inputs"].keys() == taken.keys()
