"""Picture files -> pixel values: orientation, transparency, grey among colour, and one size for all."""

import collections
import struct

import numpy as np
from PIL import Image
from PIL import ImageOps

from data import DataError

# What Pillow raises on files that are damaged, or were never pictures.
ERRORS = (OSError, ValueError, SyntaxError, KeyError, TypeError, EOFError, OverflowError, struct.error,
          Image.DecompressionBombError)
_ORIENTATION = 0x0112  # of EXIF


class Reader:
  """Makes arrays of pictures, one after the other, and remembers what was odd about them."""

  def __init__(self, size: int = 0):
    """
    Args:
      size: pixels a side that every picture gets, see `fit`; 0 leaves them as they are.
    """
    self._size, self._counts, self._first = size, collections.Counter(), None

  def read(self, picture: Image.Image, where: str) -> np.ndarray:
    """uint8 [H, W] of a grey picture, [H, W, 3] of another; `where` names it in messages.

    Raises:
      DataError: more than 8 bits a channel, or another size than the first picture's.
      Any of ERRORS: the file is damaged.
    """
    if picture.mode.startswith(('I', 'F')):
      raise DataError(f'{where}: an image has more than 8 bits a channel (mode {picture.mode}); '
                      'give such a set as an .npz file.')
    if picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
      picture = ImageOps.exif_transpose(picture)
      self._counts['turned'] += 1
    grey = picture.mode in ('1', 'L', 'LA', 'La')
    pixels = np.asarray(self._opaque(picture, grey).convert('L' if grey else 'RGB'))
    self._counts['grey' if grey else 'colour'] += 1
    return self.resized(pixels, where)

  def resized(self, pixels: np.ndarray, where: str) -> np.ndarray:
    """Pixel values [H, W] or [H, W, D] in the wanted size. Raises DataError: another one than the first's."""
    if self._size:
      return fit(pixels, self._size)
    if self._first is None:
      self._first = (where, pixels.shape[:2])
    first, shape = self._first
    if pixels.shape[:2] != shape:
      raise DataError(f'images differ in size: {first} is {shape}, {where} is {pixels.shape[:2]}; '
                      f'run.data.size={min(*shape, 32)} would resize and crop all.')
    return pixels

  def alike(self, images: list[np.ndarray]) -> list[np.ndarray]:
    """The images read, all of them RGB where one that was read is."""
    if not self._counts['colour']:
      return images
    return [np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image for image in images]

  def remarks(self) -> list[str]:
    """A line for each thing that was odd."""
    found, lines = self._counts, []
    if found['turned']:
      lines.append(f'Images turned upright, as their EXIF data say: {found["turned"]}.')
    if found['transparent']:
      lines.append(f'Images with transparency, laid on white: {found["transparent"]}.')
    if found['grey'] and found['colour']:
      lines.append(f'Grey images among colour, read as RGB: {found["grey"]} of {found["grey"] + found["colour"]}.')
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
  method = Image.Resampling.BOX if size <= min(pixels.shape[:2]) else Image.Resampling.BILINEAR
  channels = [np.asarray(ImageOps.fit(Image.fromarray(np.ascontiguousarray(channel)), (size, size), method))
              for channel in np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), 2, 0)]
  return np.stack(channels, axis=2).reshape(size, size, *pixels.shape[2:])


def suffixes() -> frozenset[str]:
  """Of files that can be read as pictures, such as '.png'."""
  Image.init()
  return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)

