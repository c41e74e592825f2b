"""Cutting rows into equal tiles for `lax.map` and `lax.scan`. Integers only."""

TILE_VALUES = 1 << 19
MIN_TILE_ROWS = 32


def tile_rows(rows: int, width: int) -> int:
    """Rows of a tile: at most TILE_VALUES float32 values, dividing `rows` if it can.

    A tile that is widened to float32 should stay in the second-level cache. Where no
    divisor comes within a factor of 4 of that size, the caller pads the last tile.
    """
    most = max(MIN_TILE_ROWS, TILE_VALUES // width)
    if rows <= most:
        return rows
    for tile in range(most, most // 4, -1):
        if rows % tile == 0:
            return tile
    return most
