"""Pictures become the pixels that are meant: upright, on white, alike in channels, of one size."""

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from PIL import Image

from data import DataError, images, sources

ORIENTATION = 0x0112
# What a viewer does with the pixels of a file of that orientation.
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: np.rot90,
}


def _pixels(height=4, width=4, channels=3, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def _exif(orientation):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  return exif


def _save(path, split, label, name, picture, **options):
  folder = path / split / label
  folder.mkdir(parents=True, exist_ok=True)
  picture.save(folder / name, **options)


@pytest.mark.parametrize('orientation', UPRIGHT)
@pytest.mark.parametrize('suffix', ['.png', '.TIFF'])
def test_pictures_are_turned_upright(tmp_path, orientation, suffix):
  pixels = _pixels()
  for split in ('train', 'test'):
    for label in 'ab':
      _save(tmp_path, split, label, f'0{suffix}', Image.fromarray(pixels), exif=_exif(orientation))
  dataset = sources.find('x', str(tmp_path)).load()
  np.testing.assert_array_equal(dataset.train_images[1], UPRIGHT[orientation](pixels))
  said = ('Images turned upright, as their EXIF data say: 4.',)
  assert dataset.remarks == (said if orientation > 1 else ())


def _with_alpha(mode):
  """An opaque, a half transparent and a transparent pixel of 200, and what they are on white."""
  alpha = np.array([[255, 128, 0]], np.uint8)
  picture = Image.new(mode, (3, 1), (200,) * (len(mode) - 1) + (0,))
  picture.putalpha(Image.fromarray(alpha))
  return picture, [[200, round(200 * 128 / 255 + 255 * 127 / 255), 255]]


@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_laid_on_white(mode):
  picture, expected = _with_alpha(mode)
  reader = images.Reader()
  pixels = reader.read(picture, 'a')
  assert pixels.shape == ((1, 3) if mode == 'LA' else (1, 3, 3))
  np.testing.assert_array_equal(pixels.reshape(1, 3, -1)[..., 0], expected)
  assert reader.remarks() == ['Images with transparency, laid on white: 1.']


@pytest.mark.parametrize('mode, colour', [('P', 1), ('L', 7), ('RGB', (1, 2, 3))])
def test_a_transparent_colour_is_laid_on_white(tmp_path, mode, colour):
  picture = Image.new(mode, (2, 1), 0)
  if mode == 'P':
    picture.putpalette([10, 10, 10, 200, 0, 0])
  picture.putpixel((1, 0), colour)
  picture.save(tmp_path / 'a.png', transparency=colour)
  with Image.open(tmp_path / 'a.png') as read:
    pixels = images.Reader().read(read, 'a')
  np.testing.assert_array_equal(pixels.reshape(2, -1)[1], [255] * pixels.reshape(2, -1).shape[1])


def test_grey_becomes_rgb_wherever_one_picture_has_colour():
  grey, colour = _pixels(channels=1)[..., 0], _pixels()
  reader = images.Reader()
  read = [reader.read(Image.fromarray(grey), 'a')] * 2
  assert [pixels.shape for pixels in reader.alike(read)] == [(4, 4), (4, 4)]
  assert not reader.remarks()
  read.append(reader.read(Image.fromarray(colour), 'b'))
  first, _, last = reader.alike(read)
  np.testing.assert_array_equal(first, np.stack([grey] * 3, axis=2))
  np.testing.assert_array_equal(last, colour)
  assert reader.remarks() == ['Grey images among colour, read as RGB: 1 of 2.']


@pytest.mark.parametrize('dtype', ['uint8', 'float32', 'float64', 'int16'])
@pytest.mark.parametrize('height, width', [(8, 8), (8, 12), (14, 8)])
def test_images_shrink_by_area_from_their_central_square(dtype, height, width):
  image = np.zeros((height, width, 2), dtype)
  top, left = (height - 8) // 2, (width - 8) // 2
  square = 4 * np.random.default_rng(0).integers(0, 64, (4, 4, 2))
  image[top : top + 8, left : left + 8] = square.repeat(2, axis=0).repeat(2, axis=1)
  image[top, left] += 4  # a quarter of it is the mean's
  square[0, 0] += 1
  found = images.fit(image, 4)
  assert found.dtype == (np.uint8 if dtype == 'uint8' else np.float32)
  np.testing.assert_array_equal(found, square)


def test_images_grow_and_stay():
  image = np.arange(4, dtype=np.float32).reshape(2, 2)
  assert images.fit(image, 2) is image
  larger = images.fit(image, 4)
  assert larger.shape == (4, 4) and larger.min() == 0 and larger.max() == 3
  assert larger[0, 1] == pytest.approx(0.25)  # bilinear, of 0 and 1


def test_a_size_makes_any_pictures_alike(tmp_path):
  for split in ('train', 'test'):
    for label in 'ab':
      for i, size in enumerate([(9, 14), (8, 8), (30, 17)]):
        picture = Image.new('RGB', size, (i, 100, 'ab'.index(label)))
        _save(tmp_path, split, label, f'{i}.png', picture)
  dataset = sources.find('x', str(tmp_path), 8).load()
  assert dataset.train_images.shape == (6, 8, 8, 3) and dataset.test_images.shape == (6, 8, 8, 3)
  expected = [[i, 100, c] for c in (0, 1) for i in (0, 1, 2)]
  np.testing.assert_array_equal(dataset.train_images[:, 3, 3], expected)
  message = r"a/0.png' is \(14, 9\), '.*a/1.png' is \(8, 8\); run.data.size=9 would"
  with pytest.raises(DataError, match=message):
    sources.find('x', str(tmp_path)).load()
  assert sources.find('x', str(tmp_path), 8).key != sources.find('x', str(tmp_path)).key


@pytest.mark.filterwarnings('ignore::UserWarning')  # of Pillow's, about what is damaged
@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.tiff', 'a.gif'])
def test_a_damaged_picture_is_read_or_refused(tmp_path, name):
  for split in ('train', 'test'):
    for label in 'ab':
      _save(tmp_path, split, label, name, Image.fromarray(_pixels(8, 8)), exif=_exif(6))
  path = tmp_path / 'test' / 'b' / name
  whole = path.read_bytes()

  @settings(max_examples=150, deadline=None)
  @given(damaged(whole))
  def check(content):
    path.write_bytes(content)
    try:
      sources.find('x', str(tmp_path), 8).load()
    except DataError as error:
      assert '\n' not in str(error) and name in str(error)

  check()
