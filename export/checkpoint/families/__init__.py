"""One module per family, each with a `FAMILY`; the registry finds them."""
