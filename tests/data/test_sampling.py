"""Draws are balanced, without replacement, and fixed for ever."""

import numpy as np
import pytest

from data import sampling

LABELS = np.array([0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1, 2])


def test_the_same_for_ever():
  assert sampling.class_balanced(0, sampling.TARGETS, 3, LABELS, 6).tolist() == [9, 0, 2, 11, 10, 6]
  assert sampling.class_balanced(7, sampling.INITIAL_SUPPORT, 0, LABELS, 3).tolist() == [4, 8, 1]


def test_words_are_philox_by_image():
  """Image i's word does not depend on how many images there are."""
  a = sampling.words(5, 1, 9, 40)
  np.testing.assert_array_equal(a[:13], sampling.words(5, 1, 9, 13))
  assert a[6] == np.random.Philox(key=[5, 1], counter=[1, 9, 0, 0]).random_raw(3)[2]


@pytest.mark.parametrize('size', [3, 6, 9, 12])
def test_balanced_and_without_replacement(size):
  for step in range(20):
    chosen = sampling.class_balanced(1, sampling.TARGETS, step, LABELS, size)
    assert len(set(chosen.tolist())) == size
    np.testing.assert_array_equal(LABELS[chosen], np.repeat(np.arange(3), size // 3))


def test_every_image_is_as_likely():
  counts = np.bincount(
    np.concatenate(
      [sampling.class_balanced(2, sampling.TARGETS, s, LABELS, 6) for s in range(3000)]
    ),
    minlength=13,
  )
  expected = 3000 * 2 / np.bincount(LABELS)[LABELS]
  assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())


def test_seed_stream_and_step_matter():
  draws = {
    tuple(sampling.class_balanced(seed, stream, step, LABELS, 6))
    for seed in (0, 1)
    for stream in (0, 1)
    for step in (0, 1)
  }
  assert len(draws) == 8


@pytest.mark.parametrize('size', [0, 4, 15])
def test_sizes_that_do_not_fit_are_refused(size):
  with pytest.raises(
    ValueError, match='multiple of 3 .* from 3 to 12 .*smallest class has 4 images'
  ):
    sampling.class_balanced(0, 0, 0, LABELS, size)


def test_centred_one_hot():
  np.testing.assert_allclose(
    sampling.centred_one_hot(np.array([2, 0]), 4),
    [[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]],
  )


def test_all_targets_are_the_training_set_in_its_order():
  assert sampling.targets(3, 5, LABELS, len(LABELS)).tolist() == list(range(13))
  assert (
    sampling.targets(0, 3, LABELS, 6).tolist()
    == sampling.class_balanced(0, sampling.TARGETS, 3, LABELS, 6).tolist()
  )


def test_noise_is_normal_for_all_that_moments_tell():
  x = sampling.normal(0, sampling.INITIAL_NOISE, 0, 100_000)
  np.testing.assert_allclose(
    [x.mean(), x.var(), (x**3).mean(), (x**4).mean()], [0, 1, 0, 3 - 0.1], atol=0.03
  )
  assert np.array_equal(sampling.normal(0, sampling.INITIAL_NOISE, 0, 10), x[:10])


def test_equal_words_go_by_index():
  words = np.random.default_rng(0).integers(0, 4, len(LABELS)).astype(np.uint64)
  order = np.lexsort((words, LABELS))
  expected = np.concatenate([order[LABELS[order] == label][:3] for label in range(3)])
  np.testing.assert_array_equal(sampling.least_of_each_class(words, LABELS, 3), expected)
