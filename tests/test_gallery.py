"""The gallery: one page, complete in itself, that says what the model does."""

import base64
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from nvae_tf.cli.gallery import main
from nvae_tf.cli.train import main as train
from nvae_tf.evaluation import card
from nvae_tf.evaluation.gallery.amounts import SMALL, TEMPERATURES
from nvae_tf.evaluation.gallery.charts import chart, labels, readable, short, ticks, vertical_range
from nvae_tf.evaluation.loading import LoadedModel, load
from nvae_tf.evaluation.logs import read_logs
from nvae_tf.evaluation.neighbours import nearest
from nvae_tf.evaluation.scores import evaluated, fid

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
SECTIONS = [
    "Samples", "From sample to sample", "From image to image", "Reconstructions",
    "What the latent groups hold", "What each group does", "Nearest training images",
    "Typical and untypical test images", "Training", "Provenance",
]  # fmt: skip


class Page(HTMLParser):
    """Collects what a page shows and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.images, self.ids, self.labels = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.labels += [values["for"]] if "for" in values else []
        self.images += [values] if tag == "img" else []
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def text(run, tmp_path_factory):
    """The page of the finished run."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main([str(run), "--output", str(path)]) == 0
    return path.read_text()


def test_the_page_holds_everything_that_it_shows(text):
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.fetched)
    assert {source[1:] for source in page.fetched if source[0] == "#"} <= set(page.ids)
    assert "script" not in page.tags and "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text
    assert re.findall(r"<h2 [^>]*>([^<]*)</h2>", text) == SECTIONS
    assert {"header", "nav", "main", "footer", "details"} <= set(page.tags)
    assert len(page.ids) == len(set(page.ids)) and set(page.labels) <= set(page.ids)
    assert all(image["alt"] and int(image["width"]) > 0 for image in page.images)


def picture(image) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))


def test_pictures_are_as_many_and_as_large_as_the_page_says(text):
    images = Page(text).images
    walls = [image for image in images if "samples at temperature" in image["alt"]][
        : 2 * len(TEMPERATURES)
    ]
    assert sum(int(image["alt"].split()[0]) for image in walls) == SMALL.wall * len(TEMPERATURES)
    for image in images:
        assert picture(image).size == (int(image["width"]), int(image["height"]))
    moving = [picture(image) for image in images if getattr(picture(image), "n_frames", 1) > 1]
    assert [film.n_frames for film in moving] == [SMALL.stations * SMALL.frames]
    originals = [image for image in images if "and its reconstruction" in image["alt"]]
    assert len(originals) == SMALL.reconstructed
    one = np.asarray(picture(originals[0]).convert("L"))[:, :96]
    assert set(np.unique(one)) == {0, 255}  # exact: digits are black and white
    assert len(np.unique(np.asarray(picture(originals[0]).convert("L")))) > 20


def test_the_numbers_of_groups_add_up(text):
    total = float(re.search(r"([\d.]+) nats over all groups", text)[1])
    kl = re.findall(r'</td><td class="right">([\d.]+)</td><td class="right">(\d+) of 4</td>', text)
    assert len(kl) == 2 and sum(float(nats) for nats, _ in kl) == pytest.approx(total, abs=0.02)
    active = re.search(r"Active latents</dt><dd><div class=\"number\">(\d+) <small>of 8", text)[1]
    assert int(active) == sum(int(number) for _, number in kl)
    nelbo = float(re.search(r"NELBO</dt><dd><div class=\"number\">([\d.]+)", text)[1])
    assert total < nelbo < 1000 and "all 359 test images, 10 draws of z each" in text
    assert re.search(r"NELBO</dt>.{,60}<small>± \d", text)


def test_training_and_page_tell_their_commands(text):
    assert "nvae-gallery" in text and "<dt>trained</dt>" in text and "nvae_tf" not in text
    assert "batch_size: 100" in text  # the configuration
    for title in ("NELBO", "KL coefficient", "Gradient norm", "Speed"):
        assert f"<h3>{title} <span>" in text
    assert "Negative ELBO in nats per image" in text  # as training describes it
    assert "train" in text and "validation" in text


def report(step, split="test"):
    parts = ("nelbo", "neg_log_likelihood", "bpd_nelbo", "bpd_log_likelihood")
    numbers = {
        n: {"mean": v, "standard_error": 0.5}
        for n, v in zip(parts, (99.5, 90.25, 2, 1), strict=True)
    }
    return {**numbers, "num_images": 1234, "num_iw_samples": 50, "step": step, "split": split}


def test_results_of_this_step_alone_are_quoted(tmp_path):
    loaded = LoadedModel(None, None, 42, tmp_path)
    assert evaluated(loaded) == fid(loaded) == []
    content = {"fid": 12.5, "num_samples": 500, "temperature": 0.7, "readjust_bn": True, "step": 42}
    (tmp_path / "evaluate.json").write_text(json.dumps(report(42)))
    (tmp_path / "fid.json").write_text(json.dumps(content))
    nelbo, likelihood = evaluated(loaded)
    assert (nelbo.value, nelbo.error, nelbo.per_dim) == (99.5, 0.5, (2.0, 0.5))
    assert likelihood.value == 90.25 and "1,234 test images, 50 weighted" in likelihood.origin
    assert fid(loaded)[0].value == 12.5 and "readjusted" in fid(loaded)[0].origin
    (tmp_path / "fid.json").write_text(json.dumps({**content, "step": 41}))
    assert fid(loaded) == []
    for other in (report(41), report(42, "train"), [], {"step": 42}, {**report(42), "nelbo": "x"}):
        (tmp_path / "evaluate.json").write_text(json.dumps(other))
        assert evaluated(loaded) == []


def test_the_card_quotes_results_of_this_step_alone(run, tmp_path):
    loaded = load(str(run))._replace(folder=tmp_path)
    both = {**report(loaded.step), "likelihood": "official", "exact": report(loaded.step)}
    (tmp_path / "evaluate.json").write_text(json.dumps(both))
    text = card.text(loaded)
    for name in ("NELBO", "NELBO, exact"):
        assert f"| {name} | 99.50 ± 0.50 nats, 2.0000 ± 0.5000 bits per dim (1,234 test" in text
    for other in (report(loaded.step + 1), {"nelbo": 1.0, "step": loaded.step}):  # other versions
        (tmp_path / "evaluate.json").write_text(json.dumps(other))
        (tmp_path / "fid.json").write_text(json.dumps({"fid": 1.0, "step": loaded.step}))
        text = card.text(loaded)
        assert "NELBO" not in text and "FID" not in text


def test_the_first_points_do_not_flatten_a_curve():
    steps = np.arange(0, 1000, 10)
    curve = [(int(step), 1000.0 if step < 50 else 100.0 - step / 100) for step in steps]
    low, high = vertical_range({"train": curve})
    assert 89 < low < 90.2 and 99 < high < 100
    even = [(int(step), float(step)) for step in steps]
    assert vertical_range({"train": even})[1] > 990
    assert "nan" not in chart({"train": curve}, "falls")


def test_a_flat_curve_a_single_point_and_zeros_are_drawn():
    assert "nan" not in chart({"train": [(1, 2.0), (5, 2.0)]}, "flat")
    assert "<circle" in chart({"train": [(3, 7.0)]}, "one")
    assert chart({"train": [(3, 0.0)]}, "none", logarithmic=True) == ""
    assert "polyline" in chart({"train": [(1, 1e-3), (5, 10.0)]}, "far", logarithmic=True)
    assert "<b>" not in chart({"<b>": [(1, 2.0), (5, 2.0)]}, "<b>")


def test_ticks_are_round():
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(87.0, 104.0) == [90.0, 95.0, 100.0]
    assert [short(v) for v in (0.0, 0.001, 1500.0, 2e6, 20.0)] == ["0", "0.001", "1.5k", "2M", "20"]


def test_labels_tell_ticks_apart():
    assert labels(ticks(277.401, 277.449)) == ["277.41", "277.42", "277.43", "277.44"]
    assert labels([0.0, 500.0, 1000.0, 1500.0]) == ["0", "0.5k", "1.0k", "1.5k"]
    assert labels([99990.0, 99995.0, 100000.0]) == ["99.990k", "99.995k", "100.000k"]
    assert labels([0.0, 2e-5, 4e-5]) == ["0", "2e-05", "4e-05"]
    assert labels([1.00e-5, 1.01e-5]) == ["1.00e-05", "1.01e-05"]
    assert labels([0.0, 0.2, 0.4]) == ["0", "0.2", "0.4"]
    assert [readable(v) for v in (277.41, 0.00123456, 12345.6)] == ["277.4", "0.001235", "12,346"]


def test_a_page_that_cannot_be_written_is_an_error_before_anything_is_computed(
    run, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "folder", tmp_path / "file" / "page.html"):
        start = time.monotonic()
        assert main([str(run), "--output", str(output)]) == 2
        assert time.monotonic() - start < 5.0
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.slow
def test_what_cannot_be_computed_is_left_out_alone(run, tmp_path, photographs, capsys):
    """One test image: interpolations need two, and everything else is shown."""
    folders = [tmp_path / "images" / split for split in ("train", "test")]
    for folder, images in zip(folders, (photographs[:20], photographs[20:21]), strict=True):
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number}.png")
    recipe = run.parent / "one.yaml"
    recipe.write_text(
        "dataset: images\nimage_size: 32\nbatch_size: 10\nnum_latent_scales: 1\n"
        "num_groups_per_scale: 2\nnum_latent_per_group: 4\nnum_channels_enc: 4\n"
        "num_channels_dec: 4\nnum_preprocess_cells: 1\nnum_postprocess_cells: 1\n"
        "num_nf: 1\nepochs: 1\nwarmup_epochs: 0\njit_compile: off\nnum_mixture_dec: 2\n"
    )
    flags = ["--data", str(tmp_path / "images"), "--root", str(tmp_path / "runs")]
    assert train(["--config", str(recipe), *flags]) == 0
    assert main([str(tmp_path / "runs" / "one"), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "Left out: the test set has 1 images; interpolations need two" in text
    assert "left out: ways" in capsys.readouterr().out
    assert "could not be read" not in text
    headings = re.findall(r"<h2 [^>]*>([^<]*)</h2>", text)
    assert {"From image to image", "Reconstructions", "Nearest training images"} <= set(headings)
    assert "NELBO</dt>" in text and "nats over all groups" in text and "width:-" not in text
    assert "official likelihood" in text
    if CHROMIUM:
        assert loaded(text, tmp_path, 400, dark=False)["before"] == ["t-2"]


def test_an_image_of_the_set_is_its_own_neighbour(photographs):
    images = photographs.astype(np.float32) / 255.0
    found = nearest(images[[5, 40]], (images[i : i + 7] for i in range(0, 64, 7)), 3)
    np.testing.assert_array_equal(found.images[:, 0], images[[5, 40]])
    assert found.distances[:, 0].max() < 1e-3 and np.all(np.diff(found.distances) >= 0.0)
    differences = np.sqrt(np.mean((images - images[5]) ** 2, (1, 2, 3)))
    np.testing.assert_allclose(found.distances[0, 1:], np.sort(differences)[1:3], rtol=1e-3)
    assert nearest(images[:1], [images[1:3]], 5).images.shape == (1, 2, 32, 32, 3)
    bordered = images.copy()
    bordered[:, 0] = np.random.default_rng(0).uniform(size=bordered[:, 0].shape)
    inside = nearest(images[[5]], [bordered], 1, (slice(1, 32), slice(0, 32)))
    np.testing.assert_array_equal(inside.images[0, 0], bordered[5])
    assert inside.distances[0, 0] < 1e-3


def test_logs_tell_curves_and_how_training_was_started(run, tmp_path):
    logs = read_logs(run / "logs")
    nelbo = logs.scalars["elbo/nelbo"]
    assert nelbo.description.startswith("Negative ELBO") and len(nelbo.curves["validation"]) == 3
    assert len(logs.sessions) == 1 and "CPU" in logs.sessions[0] and logs.began < logs.ended
    assert 0.0 < logs.seconds <= logs.ended - logs.began
    assert read_logs(tmp_path) == ({}, [], None, None, 0.0)


def test_a_wrong_folder_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_names_from_outside_are_escaped_and_data_may_be_missing(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = (run / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(recipe.replace("digits", "mnist"))
    name = "<script>alert('x')</script>"
    arguments = [str(tmp_path / "run"), "--data", str(tmp_path / name)]
    assert main([*arguments, "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "script" not in Page(text).tags and "&lt;script&gt;alert(&#x27;x" in text
    assert "Nearest training images" not in text and "What each group does" in text


# Runs in the page before anything is loaded; findings go to the frame around it, which keeps them.
PROBE = """<script>
const problems = [];
addEventListener('error', event => problems.push(event.message || event.target.alt), true);
addEventListener('securitypolicyviolation', event => problems.push('refused: ' + event.blockedURI));
addEventListener('load', () => {
  const root = document.documentElement;
  const shown = () => [...document.querySelectorAll('.chooser > figure')]
    .filter(figure => figure.offsetHeight > 0).map(figure => figure.className);
  const before = shown();
  document.querySelector('label[for=t-0]').click();
  const after = shown();
  const frozen = document.querySelector('.film .frozen');
  const moving = frozen.offsetHeight === 0;
  document.querySelector('label[for=frozen]').click();
  // Everything that can be used is reached by the keyboard, and what has its focus is marked.
  const outlines = [...document.querySelectorAll('.chooser > input, .strips, .skip, nav a')].map(e => {
    e.focus({focusVisible: true});
    const marked = e.matches('input') ? e.nextElementSibling : e;
    return document.activeElement === e && getComputedStyle(marked).outlineStyle;
  });
  parent.postMessage(JSON.stringify({
    outlines, problems, before, after, moving, stopped: frozen.offsetHeight > 0,
    width: innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    background: getComputedStyle(document.body).backgroundColor,
    clipped: [...document.querySelectorAll('svg svg')]
      .map(inner => getComputedStyle(inner).overflow),
    wide: [...document.body.querySelectorAll('*')]
      .filter(e => !e.closest('.strips, .skip') && e.getBoundingClientRect().right > innerWidth + 1)
      .map(e => e.tagName + '.' + e.className),
    empty: [...document.images].filter(i => i.offsetHeight > 0 && !i.naturalWidth).map(i => i.alt),
    requests: performance.getEntriesByType('resource').map(e => e.name)
      .filter(name => !name.startsWith('data:')),
  }), '*');
});
</script>"""
FRAME = """<body><iframe src="page.html" width="{width}" height="900"></iframe><pre></pre><script>
addEventListener('message', event => document.querySelector('pre').textContent = event.data);
</script></body>"""


def loaded(text, tmp_path, width, dark):
    """What a browser finds in a page, and what it writes about it."""
    # A window cannot be narrower than 500 pixels, but a frame can. The probe is a script, which the
    # page itself forbids.
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(text.replace("<meta name=", PROBE + "<meta name=", 1))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1])
    assert found["width"] == width and found["scroll"] <= found["client"]
    assert found["problems"] == found["wide"] == found["empty"] == found["requests"] == []
    return found


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
@pytest.mark.parametrize(
    ("width", "dark"), [(400, False), (400, True), (1300, False), (1300, True)]
)
def test_a_browser_shows_it_without_errors_overflow_or_requests(text, tmp_path, width, dark):
    found = loaded(text, tmp_path, width, dark)
    assert len(found["clipped"]) == 9 and set(found["clipped"]) == {"hidden"}
    assert found["before"] == ["t-2"] and found["after"] == ["t-0"]
    assert found["moving"] and found["stopped"]
    assert len(found["outlines"]) > 10 and False not in found["outlines"]
    assert "none" not in found["outlines"]
    red = int(re.findall(r"\d+", found["background"])[0])
    assert red < 60 if dark else red > 200
