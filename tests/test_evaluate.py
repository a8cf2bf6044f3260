"""``evaluate_keras.py``: likelihood and samples."""

import gc
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import nvae_tf
from nvae_tf.cli.evaluate import main
from nvae_tf.engine.scope import BatchStatistics
from nvae_tf.engine.weights import weights_below
from nvae_tf.evaluation import likelihood, loading, sampling, scores
from nvae_tf.io.errors import UserError
from nvae_tf.layers.latent_group import FromPrior

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.pt")), ids=lambda path: path.stem)
def test_official_files_evaluate_to_the_official_numbers(path):
    model = loading.load(str(path)).model
    with np.load(path.with_suffix(".npz")) as file:
        noise = [np.transpose(file[f"eps/{i}"], (0, 2, 3, 1)) for i in range(int(file["eps"]))]
        images = tf.constant(np.transpose(file["x"], (0, 2, 3, 1)))
        expected = file["eval/log_iw"]
        nelbo = file["eval/recon"] + file["eval/kl_all"].sum(1)
    actual_nelbo, weights = likelihood.draw_terms(model, model.bottom_up(images), images, noise)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(actual_nelbo, nelbo, rtol=1e-4)


def evaluate(run, tmp_path, *arguments):
    output = tmp_path / "out"
    status = main(["--checkpoint", str(run), "--output", str(output), *map(str, arguments)])
    assert status == 0
    return json.loads((output / "evaluate.json").read_text())


@pytest.mark.slow
def test_more_draws_tighten_the_bound(run, tmp_path, capsys):
    reports = [
        evaluate(run, tmp_path, "--num_iw_samples", k, "--iw_chunk", 10) for k in (1, 10, 50)
    ]
    negative = [report["neg_log_likelihood"]["mean"] for report in reports]
    assert negative[0] > negative[1] > negative[2]
    last = reports[-1]
    assert last["nelbo"]["mean"] > negative[2]
    assert (last["num_images"], last["num_iw_samples"], last["step"], last["seed"]) == (
        359,
        50,
        42,
        1,
    )
    for bits, nats in (("bpd_nelbo", "nelbo"), ("bpd_log_likelihood", "neg_log_likelihood")):
        for part in ("mean", "standard_error"):
            np.testing.assert_allclose(last[bits][part], last[nats][part] / (784 * np.log(2)))
    assert "bits per dim" in capsys.readouterr().out


@pytest.mark.slow
def test_the_likelihood_depends_on_the_seed_alone(run, tmp_path):
    options = ("--num_iw_samples", 6)
    one = evaluate(run, tmp_path, *options, "--batch_size", 100, "--iw_chunk", 3)
    other = evaluate(run, tmp_path, *options, "--batch_size", 64, "--iw_chunk", 4)
    seeded = evaluate(run, tmp_path, *options, "--seed", 2, "--iw_chunk", 6)
    for name in ("nelbo", "neg_log_likelihood"):
        np.testing.assert_allclose(one[name]["mean"], other[name]["mean"], rtol=1e-5)
        assert abs(one[name]["mean"] - seeded[name]["mean"]) > 1e-3


def test_samples_are_written_and_reproducible(run, tmp_path, capsys):
    arguments = ["--checkpoint", str(run), "--eval_mode", "sample", "--temp", "0.7"]
    arguments += ["--num_samples", "30", "--batch_size", "8"]
    for name in ("a", "b"):
        output = ["--output", str(tmp_path / name), "--format", "npz"]
        assert main([*arguments, *output]) == 0
    assert "samples/s" in capsys.readouterr().out
    one, other = (np.load(tmp_path / n / "samples_0.7.npz")["images"] for n in ("a", "b"))
    assert one.shape == (30, 32, 32, 1) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, other)
    assert Image.open(tmp_path / "a" / "samples_0.7.png").width >= 10 * 64
    assert main([*arguments, "--output", str(tmp_path / "c"), "--format", "png"]) == 0
    files = sorted((tmp_path / "c" / "samples_0.7").iterdir())
    assert len(files) == 30
    np.testing.assert_array_equal(np.asarray(Image.open(files[3])), one[3, ..., 0])


def decoder_statistics(model, seed, indices):
    scope = model.scope(training=True)
    model.top_down(FromPrior(model.draw_noise(indices, seed), 0.7), scope)
    return [
        (layer, *(part.numpy() for part in BatchStatistics.from_vector(vector)[:2]))
        for layer, vector in scope.statistics.items()
    ]


def test_readjusting_pools_the_statistics_of_samples(run):
    model = loading.load(str(run)).model
    before = {weight: weight.numpy() for weight in weights_below(model)}
    options = dict(batches=3, batch_size=4, seed=5)
    statistics, left_out = sampling.batch_norm_statistics(model, 0.7, **options)
    assert left_out == 0
    sampling.readjust_batch_norm(model, statistics)
    # The first batch norm of the decoder sees values that no other one has touched: its pooled
    # statistics are those of all twelve samples at once.
    stream = (5, sampling.READJUSTING_STREAM)
    layer, mean, variance = decoder_statistics(model, stream, tf.range(12, dtype=tf.int64))[0]
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-3)
    changed = sum(not np.array_equal(w.numpy(), value) for w, value in before.items())
    assert changed == 2 * len(decoder_statistics(model, stream, tf.range(2, dtype=tf.int64)))


def test_readjusting_never_yields_nan(run, tmp_path, capsys):
    model = loading.load(str(run)).model
    with pytest.raises(UserError, match="none of 2 batches .* is finite"):
        sampling.batch_norm_statistics(model, float("inf"), batches=2, batch_size=4, seed=0)
    assert all(np.all(np.isfinite(weight)) for weight in model.get_weights())
    arguments = [
        "--checkpoint",
        str(run),
        "--eval_mode",
        "sample",
        "--readjust_bn",
        "--temp",
        "0.7",
    ]
    arguments += ["--readjust_batches", "4", "--num_samples", "10", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert len(np.unique(np.asarray(Image.open(tmp_path / "samples_0.7_readjusted.png")))) > 10


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("evaluate", "evaluate.json"),
        ("sample", "samples_1.png"),
        ("fid_stats", "fid_stats.npz"),
        ("reconstruct", "reconstruct.json"),
        ("interpolate", "interpolate.gif"),
        ("traverse", "traverse.json"),
        ("encode", "latents.npz"),
        ("export", "MODEL_CARD.md"),
        ("card", "model_card.png"),
        ("ood", "ood.csv"),
    ],
)
def test_a_result_that_cannot_be_written_is_known_before_anything_is_computed(
    mode, name, run, tmp_path, capsys
):
    (tmp_path / name).mkdir()
    assert main(["--checkpoint", str(run), "--eval_mode", mode, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert f"error: {tmp_path / name}: is a folder" in said.err and said.out == ""
    assert list(tmp_path.rglob("*")) == [tmp_path / name]


def test_a_folder_is_replaced_by_samples_only_if_it_holds_nothing_else(run, tmp_path, capsys):
    arguments = ["--checkpoint", str(run), "--eval_mode", "sample", "--output", str(tmp_path)]
    arguments += ["--format", "png", "--num_samples"]
    folder = tmp_path / "samples_1"
    assert main([*arguments, "3"]) == main([*arguments, "2"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000001.png"]
    (folder / "my thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert main([*arguments, "1"]) == 2
    assert "samples_1: would be replaced, and holds my thesis.txt" in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 3
    folder.rename(tmp_path / "mine")
    folder.symlink_to("mine")
    assert main([*arguments, "1"]) == 2
    assert "samples_1: not a folder" in capsys.readouterr().err and folder.is_symlink()


def test_what_is_missing_or_damaged_is_named(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-28")
    arguments = ["--checkpoint", str(copy), "--eval_mode", "reconstruct", "--images"]
    assert main([*arguments, str(tmp_path / "nope.png")]) == 2
    assert f"--images: {tmp_path / 'nope.png'}: no such file or folder" in capsys.readouterr().err
    next((copy / "checkpoints" / "step-42").glob("*.data*")).write_bytes(b"")
    with pytest.raises(UserError, match=r"step-42: this checkpoint cannot be restored \("):
        nvae_tf.load(copy)
    (copy / "config.yaml").unlink()
    with pytest.raises(UserError, match="config.yaml: no such file, and without it"):
        nvae_tf.load(copy)
    nvae_tf.load(run).save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(UserError, match="w.weights.h5: weights alone, .*load_weights"):
        nvae_tf.load(tmp_path / "w.weights.h5")
    nvae_tf.load(run).save(tmp_path / "model.keras")
    with pytest.raises(UserError, match="model.keras: a saved model without its run: load it with"):
        loading.load(str(tmp_path / "model.keras"))


def test_official_files_of_a_folder_do_not_share_their_scores(tmp_path, capsys):
    for name in ("mnist", "cifar10_flow"):
        shutil.copy(REFERENCE / f"{name}.pt", tmp_path)
    loaded = [loading.load(str(tmp_path / f"{name}.pt")) for name in ("mnist", "cifar10_flow")]
    report = {"fid": 1.0, "num_samples": 9, "temperature": 1.0, "readjust_bn": False}
    (tmp_path / "fid.json").write_text(json.dumps({**report, **scores.reported_model(loaded[0])}))
    assert loaded[0].folder == loaded[1].folder
    assert len(scores.fid(loaded[0])) == 1 and scores.fid(loaded[1]) == []


def test_tensorflow_lists_nothing_of_a_checkpoint_that_is_refused(run, tmp_path, caplog):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints" / "step-1").mkdir(parents=True)
    unknown = tf.train.Checkpoint(unknown=tf.Variable(1.0))
    rows = tf.train.Checkpoint(row_names=nvae_tf.load(run).row_names)  # without the weights
    saved = tf.train.Checkpoint(trainer=tf.train.Checkpoint(optimizer=unknown, model=rows))
    saved.write(str(copy / "checkpoints" / "step-1" / "state"))
    logger = logging.getLogger("tensorflow")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(UserError, match="step-1: this checkpoint cannot be restored"):
            nvae_tf.load(copy)
        gc.collect()
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_a_wrong_checkpoint_lists_the_runs(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "runs" / "digits").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    for given, named in (
        ("digit", "runs/digits"),
        ("runs/digit", "runs/digits"),
        ("runs", "runs/digits"),
        ("runs/empty", "runs/digits"),
        (f"{run.parent}/tyni", str(run)),
    ):
        assert main(["--checkpoint", given]) == 2
        assert capsys.readouterr().err.endswith(f"; runs are {named}\n"), given


def test_a_checkpoint_is_found_from_wherever_it_is_named(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "latest").symlink_to(run / "checkpoints" / "step-42")
    for folder, name in (
        (run / "checkpoints", "step-42"),
        (run / "checkpoints" / "step-42", "."),
        (run, "checkpoints/step-42"),
        (tmp_path, "latest"),
    ):
        monkeypatch.chdir(folder)
        loaded = loading.load(name)
        assert (loaded.step, loaded.folder) == (42, run)


def test_a_run_beside_other_files_of_tensorflow(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "best.index").write_bytes(b"of Keras's ModelCheckpoint")
    assert loading.load(str(folder)).step == 42


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--checkpoint", "/nowhere"],
            "/nowhere: no such run, checkpoint or PyTorch file; there are",
        ),
        (["--checkpoint", "/"], "no checkpoint here"),
        (["--chekpoint", "/"], "did you mean --checkpoint?"),
        (["--checkpoint", "/", "--temp", "-1"], "--temp"),
        (["--checkpoint", "/", "--num_iw_samples", "0"], "--num_iw_samples"),
        (
            ["--checkpoint", "/", "--eval_mode", "interpolate", "--steps", "10001"],
            "10001 is not allowed; expected 2 to 10000",
        ),
        (["--eval_mode", "sample"], "--checkpoint"),
        (
            ["--checkpoint", "/", "--indices", "3"],
            "--indices: not for --eval_mode evaluate; it is for reconstruct, interpolate and traverse",
        ),
        (
            ["--checkpoint", "/", "--eval_mode", "reconstruct", "--readjust_bn"],
            "--readjust_bn: not for --eval_mode reconstruct; it is for sample and evaluate_fid",
        ),
        (
            ["--checkpoint", "/", "--eval_mode", "card", "--temp", "1.0"],
            "--temp: not for --eval_mode card",
        ),
        *(
            (["--checkpoint", "/", "--eval_mode", *line.split()], message)
            for line, message in {
                "ood --images a --eval_on_train": "--eval_on_train: has no effect beside --images",
                "encode --images a --eval_on_train": "--eval_on_train: has no effect beside --images",
                "traverse --eval_on_train": "--eval_on_train: has no effect without --indices",
                "interpolate --indices 1 2 --num_samples 5": "--num_samples: has no effect beside "
                "--images or --indices",
                "interpolate --images a b --temp 0.3": "--temp: has no effect beside --images or --ind",
                "sample --readjust_batches 3": "has no effect without --readjust_bn",
                "export --readjust_batches 3": "has no effect without --readjust_temps",
            }.items()
        ),
        (["--checkpoint", "d\udcff"], "not usable as a path ('utf-8' codec can't encode"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse's own way out
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error
