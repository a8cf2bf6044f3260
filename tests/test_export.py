"""The exported SavedModel: the run's images, with TensorFlow alone."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.cli.evaluate import main
from nvae_tf.evaluation import likelihood, loading, sampling
from nvae_tf.evaluation.export import export
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.model import NVAE

EXAMPLE = Path(__file__).parent.parent / "examples" / "sample_savedmodel.py"

CLIENT = """
import sys
import numpy as np, tensorflow as tf
folder, sent, output = sys.argv[1:]
call = tf.saved_model.load(folder).signatures
sent = {name: tf.constant(value) for name, value in np.load(sent).items()}
images, noise = sent["images"], {n: v for n, v in sent.items() if n.startswith("noise_")}
def sample(count, temperature):
    return call["sample"](batch_size=tf.constant(count), temperature=tf.constant(temperature),
                          seed=tf.constant(3))["images"]
def generate(temperature):
    return call["generate"](temperature=tf.constant(temperature), **noise)["images"]
drawn = call["encode"](images=images, **{name: value[:3] for name, value in noise.items()})
means = call["encode"](images=images, **{n: tf.zeros_like(v[:1]) for n, v in noise.items()})
latents = {name: value for name, value in means.items() if name.startswith("z_")}
np.savez(output, sample=sample(5, 0.8), more=sample(7, 0.8), readjusted=sample(5, 0.7),
         generate=generate(0.8), generate_readjusted=generate(0.7),
         decode=call["decode"](**latents)["images"], kl=drawn["kl"], kl_at_means=means["kl"],
         reconstruct=call["reconstruct"](images=images)["reconstructions"])
others = {"nvae_tf", "tensorflow_probability", "tf_keras"} & set(sys.modules)
assert not others, others
"""


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of an export's versions."""
    folder = tmp_path_factory.mktemp("export") / "digits"
    arguments = ["--checkpoint", run, "--eval_mode", "export", "--output", folder]
    arguments += ["--readjust_temps", 0.7, "--readjust_batches", 3]
    assert main([*map(str, arguments)]) == 0
    return folder


def ask(python, run, version, tmp_path):
    """What a process without our software gets from an export, and the images it sent."""
    images = np.random.default_rng(0).integers(0, 2, (3, 32, 32, 1)).astype(np.float32)
    # The noise that `sample` draws for itself.
    noise = loading.load(str(run)).model.draw_noise(5, (3, sampling.SAMPLING_STREAM))
    named = {f"noise_{group:02d}": tensor for group, tensor in enumerate(noise)}
    np.savez(tmp_path / "sent.npz", images=images, **named)
    files = [str(tmp_path / "sent.npz"), str(tmp_path / "out.npz")]
    # Only what every process has: the variable that chooses Keras 2 is not among it.
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "-1"}
    subprocess.run([python, "-c", CLIENT, str(version), *files], check=True, env=environment)
    with np.load(tmp_path / "out.npz") as file:
        return images, dict(file)


def check(run, images, outputs):
    model = loading.load(str(run)).model
    seed = (3, sampling.SAMPLING_STREAM)
    close = dict(atol=1e-5)
    np.testing.assert_allclose(outputs["sample"], model.sample(5, 0.8, seed=seed), **close)
    np.testing.assert_array_equal(outputs["more"].shape, (7, 32, 32, 1))
    np.testing.assert_allclose(outputs["more"][:5], outputs["sample"], **close)
    np.testing.assert_allclose(outputs["generate"], outputs["sample"], **close)
    reconstruction = model.reconstruct(images)
    np.testing.assert_allclose(outputs["reconstruct"], reconstruction, **close)
    np.testing.assert_allclose(outputs["decode"], outputs["reconstruct"], **close)
    noise = model.draw_noise(3, seed)
    for name, drawn in (("kl", noise), ("kl_at_means", None)):
        kl = [latent.kl_per_image for latent in model.encode(images, drawn)]
        np.testing.assert_allclose(outputs[name], np.stack(kl, 1), rtol=1e-4)
    # Drawn with noise, the KL is the objective's.
    nelbo, _ = likelihood.draw_terms(model, model.bottom_up(images), images, noise)
    recon = -model.log_likelihood(model(images, noise).parameters, images)
    np.testing.assert_allclose(outputs["kl"].sum(1), nelbo - recon, rtol=1e-3)
    plain = model.sample(5, 0.7, seed=seed)
    statistics, _ = sampling.batch_norm_statistics(model, 0.7, batches=3, batch_size=16, seed=1)
    sampling.readjust_batch_norm(model, statistics)
    readjusted = model.sample(5, 0.7, seed=seed)
    for name in ("readjusted", "generate_readjusted"):
        np.testing.assert_allclose(outputs[name], readjusted, **close)
    assert np.abs(plain - readjusted).max() > 1e-2


def test_the_export_is_the_run_with_tensorflow_alone(run, exported, tmp_path):
    check(run, *ask(sys.executable, run, exported / "1", tmp_path))
    subprocess.run([sys.executable, EXAMPLE, exported / "1", tmp_path / "grid.png"], check=True)
    assert tf.io.decode_png((tmp_path / "grid.png").read_bytes()).shape == (128, 128, 1)


@pytest.mark.slow
def test_the_export_runs_where_only_tensorflow_is_installed(run, exported, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", f"tensorflow=={tf.__version__}"], check=True
    )
    others = ["-c", "import importlib.util as u; assert not u.find_spec('nvae_tf')"]
    subprocess.run([python, *others], check=True, cwd=tmp_path)
    check(run, *ask(str(python), run, exported / "1", tmp_path))


def operations(signature):
    """Kinds of operations in a signature, the functions that it calls included."""
    graph = signature.graph.as_graph_def()
    nodes = [*graph.node, *(n for function in graph.library.function for n in function.node_def)]
    return {node.op for node in nodes}


def test_other_formats_find_nothing_that_they_lack(exported):
    signatures = tf.saved_model.load(str(exported / "1")).signatures
    assert set(signatures) == {"sample", "generate", "decode", "encode", "reconstruct"}
    for name, signature in signatures.items():
        kinds = operations(signature)
        assert any("Random" in operation for operation in kinds) == (name == "sample")
        assert "Einsum" not in kinds
        # ONNX knows inputs and outputs by their names alone.
        inputs = signature.structured_input_signature[1]
        assert inputs and not inputs.keys() & signature.structured_outputs.keys()


def test_the_card_lies_beside_the_versions(run, exported):
    card = (exported / "MODEL_CARD.md").read_text()
    for text in (
        "| data set | digits |",
        "32x32 (width x height), 1 channel, binary |",
        "| parameters | 29,510 |",
        "| training steps | 42 |",
        "| latents | 2 of 8x8x4 (",
        "`generate`",
        "0.7",
    ):
        assert text in card
    assert (exported / "model_card.png").stat().st_size > 1000


def test_versions_count_up_and_nothing_half_written_stays(exported, run, tmp_path, capsys):
    model = loading.load(str(run)).model
    for version in ("1", "2"):
        assert export(model, {}, tmp_path / "served").name == version
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["1", "2"]
    (tmp_path / "file").write_text("in the way")
    arguments = ["--checkpoint", str(run), "--eval_mode", "export"]
    assert main([*arguments, "--output", str(tmp_path / "file" / "export")]) == 2
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "cannot be written" in errors and "--output" in errors


def test_colours_are_exported_too(photographs, tmp_path):
    from nvae_tf.config import ModelConfig
    from nvae_tf.image_spec import ImageSpec

    config = ModelConfig(
        num_latent_scales=1, num_groups_per_scale=2, num_latent_per_group=2, num_channels_enc=4,
        num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1, num_mixture_dec=2,
        num_nf=1,
    )  # fmt: skip
    model = NVAE(config, ImageSpec(32, 32, 3))
    loaded = tf.saved_model.load(str(export(model, {}, tmp_path / "colour")))
    seed = (9, sampling.SAMPLING_STREAM)
    outputs = loaded.sample(tf.constant(3), tf.constant(0.9), tf.constant(9))["images"]
    np.testing.assert_allclose(outputs, model.sample(3, 0.9, seed=seed), atol=1e-4)
    images = photographs[:2].astype(np.float32) / 255.0
    outputs = loaded.reconstruct(images)["reconstructions"]
    np.testing.assert_allclose(outputs, model.reconstruct(images), atol=1e-4)
    noise = model.draw_noise(3, seed)
    named = {f"noise_{group:02d}": tensor for group, tensor in enumerate(noise)}
    outputs = loaded.generate({"temperature": tf.constant(0.9), **named})["images"]
    means = model.render(model.top_down(FromPrior(noise, 0.9)).parameters)
    np.testing.assert_allclose(outputs, means, atol=1e-4)
