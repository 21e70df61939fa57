"""Where runs live: one Protocol (`store`), one module per kind of store, `open` to choose, `probe` to prove."""
