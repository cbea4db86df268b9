"""The commands `data verify`, `data new` and `data prepare`, which work on data before any training. No torch."""
