"""Pixel values of pictures and arrays: upright, opaque, alike in size, channels and range."""

import collections
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from data import DataError

# What Pillow raises on files that are damaged, or were never pictures.
ERRORS = (
  OSError,
  ValueError,
  SyntaxError,
  KeyError,
  TypeError,
  EOFError,
  OverflowError,
  struct.error,
  Image.DecompressionBombError,
)
_ORIENTATION = 0x0112  # of EXIF
_RANGE_IMAGES = 5000  # images of a split from which its range is judged
_SUGGESTED = 32  # pixels a side, at most, in the message on different sizes


class Reader:
  """Reads a set's images one after the other, and counts those that had to be changed."""

  def __init__(self, size: int = 0):
    """Begins with a count of nothing.

    Args:
      size: pixels a side that every image gets, see `fit`; 0 leaves them as they are.
    """
    self._size = size
    self._counts: collections.Counter[str] = collections.Counter()
    self._first: tuple[str, tuple[int, ...]] | None = None

  def read(self, picture: Image.Image, where: str) -> np.ndarray:
    """Reads a picture.

    Args:
      picture: opened, not yet decoded.
      where: names it in messages.

    Returns:
      uint8 [H, W] of a grey picture, [H, W, 3] of another.

    Raises:
      DataError: more than 8 bits a channel, or another size than the first picture's.
      Any of ERRORS: the file is damaged.
    """
    if picture.mode.startswith(('I', 'F')):
      raise DataError(
        f'{where}: an image has more than 8 bits a channel (mode {picture.mode}); '
        'give such a set as an .npz file.'
      )
    if picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
      picture = ImageOps.exif_transpose(picture)
      self._counts['turned'] += 1
    grey = picture.mode in ('1', 'L', 'LA', 'La')
    self._counts['grey' if grey else 'colour'] += 1
    picture = self._opaque(picture, grey).convert('L' if grey else 'RGB')
    return self.resized(np.asarray(picture), where)

  def resized(self, pixels: np.ndarray, where: str) -> np.ndarray:
    """Pixel values [H, W] or [H, W, D] in the size that was asked for.

    Raises:
      DataError: none was asked for, and the first image had another.
    """
    if self._size:
      return fit(pixels, self._size)
    if self._first is None:
      self._first = (where, pixels.shape[:2])
    first, shape = self._first
    if pixels.shape[:2] != shape:
      raise DataError(
        f'images differ in size: {first} is {shape}, {where} is {pixels.shape[:2]}; '
        f'run.data.size={min(*shape, _SUGGESTED)} would resize and crop all.'
      )
    return pixels

  def alike(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
    """Images that were read; grey ones as RGB if any image of the set has colours."""
    if not self._counts['colour']:
      return pixels
    return [np.repeat(each[..., None], 3, axis=2) if each.ndim == 2 else each for each in pixels]

  def remarks(self) -> list[str]:
    """Lines for the user on images that had to be changed."""
    found, lines = self._counts, []
    if found['turned']:
      lines.append(f'Images turned upright, as their EXIF data say: {found["turned"]}.')
    if found['transparent']:
      lines.append(f'Images with transparency, laid on white: {found["transparent"]}.')
    if found['grey'] and found['colour']:
      lines.append(
        'Grey images among colour, read as RGB: '
        f'{found["grey"]} of {found["grey"] + found["colour"]}.'
      )
    return lines

  def _opaque(self, picture: Image.Image, grey: bool) -> Image.Image:
    """The picture on white."""
    if not picture.has_transparency_data:
      return picture
    picture = picture.convert('LA' if grey else 'RGBA')
    white = Image.new('L' if grey else 'RGB', picture.size, 'white')
    white.paste(picture.convert(white.mode), mask=picture.getchannel('A'))
    self._counts['transparent'] += 1
    return white


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
  """The central square of an image, resampled to `size` pixels a side: by area where it shrinks.

  Args:
    pixels: [H, W] or [H, W, D], any number type.
    size: pixels.

  Returns:
    [size, size] or [size, size, D]; uint8 stays so, all else becomes float32.
  """
  if pixels.shape[:2] == (size, size):
    return pixels
  pixels = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
  shrinks = size <= min(pixels.shape[:2])
  method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
  channels = []
  for channel in np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), 2, 0):
    picture = Image.fromarray(np.ascontiguousarray(channel))
    channels.append(np.asarray(ImageOps.fit(picture, (size, size), method)))
  return np.stack(channels, axis=2).reshape(size, size, *pixels.shape[2:])


def suffixes() -> frozenset[str]:
  """Suffixes of files that can be read as pictures, such as '.png'."""
  Image.init()
  return frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
  )


def checked(what: str, images: np.ndarray, num_labels: int, size: int) -> np.ndarray:
  """Checks the images of a split, and resizes them where asked.

  Args:
    what: names the split in messages.
    images: [N, H, W] or [N, H, W, D], any number type.
    num_labels: number of labels that belong to them.
    size: as for `Reader`.

  Returns:
    uint8 or float32 [N, H, W, D], finite.

  Raises:
    DataError: they have another shape or type, or values that are not finite.
  """
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or 0 in images.shape:
    raise DataError(
      f'{what} images must be [N, H, W] or [N, H, W, D] with nothing empty, '
      f'got shape {images.shape}.'
    )
  if len(images) != num_labels == images.shape[3]:
    raise DataError(
      f'{what} images of shape {images.shape}: looks like [H, W, D, N]: transpose(3, 0, 1, 2).'
    )
  check_axes(what, images.shape)
  if images.dtype != np.uint8:
    if images.dtype.kind not in 'fiu':
      raise DataError(f'{what} images must be uint8 or floating, got {images.dtype}.')
    with np.errstate(over='ignore'):
      images = images.astype(np.float32)
    if not np.isfinite(images).all():
      first = np.nonzero(~np.isfinite(images))[0][0]
      raise DataError(f'{what} image {first} contains NaN or infinity (in float32).')
  if size and images.shape[1:3] != (size, size):
    images = np.stack([fit(image, size) for image in images])
  return images


def check_axes(what: str, shape: Sequence[int]) -> None:
  """Raises DataError where [N, H, W, D] looks like [N, C, H, W]: up to 4 rows, more columns."""
  if len(shape) == 4 and shape[1] <= 4 < min(shape[2:]):
    raise DataError(
      f'{what} images of shape {tuple(shape)}: looks like [N, C, H, W]: transpose(0, 2, 3, 1).'
    )


def check_ranges(name: str, train: np.ndarray, test: np.ndarray) -> None:
  """Refuses splits in different units: 0 to 255 beside 0 to 1, or 0 to 1 beside -1 to 1.

  Splits in the same units may differ in their greatest value or in their mean, but hardly in both
  by a factor of ten; and none is free of negative values where a tenth of the other's are negative.

  Args:
    name: of the data set.
    train, test: [N, H, W, D].

  Raises:
    DataError: the units differ.
  """
  peaks, means, negative = [], [], []
  for images in (train, test):
    values = images[:: -(-len(images) // _RANGE_IMAGES)].astype(np.float32)
    negative.append(np.mean(values < 0))
    peaks.append(np.abs(values).max())
    means.append(np.abs(values).mean(dtype=np.float64))
  scaled = all(max(pair) > 10 * min(pair) for pair in (peaks, means))
  if scaled or (min(negative) == 0 and max(negative) >= 0.1):
    words = [
      f'{split} images {images.min():g} to {images.max():g} ({images.dtype})'
      for split, images in (('train', train), ('test', test))
    ]
    raise DataError(
      f'{name}: the ranges of pixel values differ: {", ".join(words)}; bring both to one range.'
    )
