"""The look of every picture: images enlarged whole numbers of times, with titles and labels."""

import numpy as np
import pytest

from nvae_tf.io.labelled_grid import GAP, MIN_WIDTH, Band, labelled_grid, reconstruction_bands


def test_without_texts_there_are_images_and_gaps_alone(photographs):
    grid = labelled_grid([Band(photographs[:5])], columns=3)
    times = MIN_WIDTH // 32
    assert grid.shape == (2 * 64 + GAP, 3 * 64 + 2 * GAP, 3) and grid.dtype == np.uint8
    second_row = grid[64 + GAP :: times, 64 + GAP : 2 * 64 + GAP : times]
    np.testing.assert_array_equal(second_row, photographs[4])
    assert np.all(grid[64 : 64 + GAP] == 255) and np.all(grid[64 + GAP :, 2 * (64 + GAP) :] == 255)


def test_large_images_keep_their_size_and_grey_ones_become_rgb(photographs):
    grey = photographs.mean(3, keepdims=True).astype(np.uint8)[:2]
    assert labelled_grid([Band(grey)], 2, min_width=10).shape == (32, 2 * 32 + GAP, 3)
    assert labelled_grid([Band(grey / 255.0)], 2, min_width=33).shape == (64, 2 * 64 + GAP, 3)


def test_labels_titles_and_captions_are_drawn_beside_images_and_not_on_them(photographs):
    images = photographs[:4]
    bare = labelled_grid([Band(images[:2]), Band(images[2:])], 2)
    bands = [Band(images[:2], "a label\nof two lines"), Band(images[2:], "", [["3 nats"], ["4"]])]
    full = labelled_grid(
        bands, 2, "A title", "and a note that is longer than both images and all else"
    )
    assert full.shape[0] > bare.shape[0] + 40 and full.shape[1] > bare.shape[1] + 60
    big = images.repeat(2, 1).repeat(2, 2)
    for image in big:
        places = [
            (y, x)
            for y in range(full.shape[0] - 64)
            for x in range(full.shape[1] - 64)
            if np.array_equal(full[y, x : x + 64], image[0])
            and np.array_equal(full[y : y + 64, x : x + 64], image)
        ]
        assert len(places) == 1
    (top, left), ink = places[0], np.any(full < 200, 2)
    assert ink[top + 64 + 2 :, left:].any()  # the caption
    assert ink[:60].any() and ink[:, : left - 64 - GAP - 4].any()  # the title and the label


def test_each_row_of_originals_is_followed_by_its_reconstructions(photographs):
    bands = reconstruction_bands(photographs[:5], photographs[5:10], 3, [["x"]] * 5)
    assert [band.label for band in bands] == ["original", "reconstruction"] * 2
    assert [len(band.images) for band in bands] == [3, 3, 2, 2]
    np.testing.assert_array_equal(bands[3].images, photographs[8:10])
    assert [len(band.captions) for band in bands] == [0, 3, 0, 2]


@pytest.mark.parametrize("columns", [1, 7])
def test_more_columns_than_images_leave_room(photographs, columns):
    grid = labelled_grid([Band(photographs[:3])], columns)
    assert grid.shape[1] == columns * (64 + GAP) - GAP
