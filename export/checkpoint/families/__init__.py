"""The known families, one file each with a `FAMILY`; a file that is put here is found, nothing lists it."""
