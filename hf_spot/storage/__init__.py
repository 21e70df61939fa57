"""Where runs are kept: one Protocol (`store`), one module for each kind of store, `open` to choose one, `probe` to check it."""
