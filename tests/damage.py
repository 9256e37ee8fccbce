"""Damage that disks, transfers and people do to files."""

from hypothesis import strategies as st


@st.composite
def damaged(draw, content: bytes) -> bytes:
  """`content` cut short, with a bit flipped, with a stretch overwritten, or replaced."""
  place = draw(st.integers(0, len(content) - 1))
  kind = draw(st.sampled_from(['cut', 'flip', 'overwrite', 'replace']))
  if kind == 'cut':
    return content[:place]
  if kind == 'flip':
    return (
      content[:place]
      + bytes([content[place] ^ 1 << draw(st.integers(0, 7))])
      + content[place + 1 :]
    )
  if kind == 'overwrite':
    stretch = draw(st.binary(min_size=1, max_size=32))
    return content[:place] + stretch + content[place + len(stretch) :]
  return draw(st.binary(max_size=64))
