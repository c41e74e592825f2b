"""Cutting rows into equal tiles for `lax.map` and `lax.scan`. Integers only."""

# float32 values of a widened tile. For one token it should stay in the first- or
# second-level cache (f16 8192 x 256 on two cores: 280 us at 2^14..2^16, 459 at 2^18);
# a matrix product with many tokens wants larger tiles.
TILE_VALUES_ONE = 1 << 15
TILE_VALUES_MANY = 1 << 18
MIN_TILE_ROWS = 16


def tile_rows(rows: int, width: int, *, tokens: int) -> int:
    """Rows of a tile that is widened to float32 at a time; divides `rows` if it can.

    Where no divisor comes within a factor of 4 of the size wished for, the caller pads
    the last tile.
    """
    values = TILE_VALUES_ONE if tokens == 1 else TILE_VALUES_MANY
    most = max(MIN_TILE_ROWS, values // width)
    if rows <= most:
        return rows
    for tile in range(most, most // 4, -1):
        if rows % tile == 0:
            return tile
    return most
